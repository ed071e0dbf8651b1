# docker build -t master_thesis .
# docker run -it --gpus all master_thesis python main.py -m ResNet -d CIFAR10
FROM mambaorg/micromamba:2.6.1

# A machine that builds images has no GPU: told of one, the solver takes the CUDA build of pytorch.
# cxx-compiler brings the gcc and g++ of torch.compile, cuda-compiler the cuda.h that triton needs on a GPU;
# git finds the commit of a checkout mounted over the code.
COPY --chown=$MAMBA_USER:$MAMBA_USER environment.yaml /tmp/environment.yaml
RUN CONDA_OVERRIDE_CUDA=12.9 micromamba install -y -n base \
        cxx-compiler "cuda-compiler>=12.8.1" git -f /tmp/environment.yaml \
    && micromamba clean --all --yes

ARG MAMBA_DOCKERFILE_ACTIVATE=1
# Triton compiles its driver where the GPU is; conda's looks for the header in this folder.
RUN python -c "import torch; assert torch.version.cuda, 'this is the CPU build of pytorch'" \
    && ls /opt/conda/targets/*/include/cuda.h
# What inductor leaves would be this user's, and --compile under --user would stumble over it.
RUN TMPDIR="$(mktemp -d)" && export TMPDIR \
    && python -c "import torch; torch.compile(torch.sin)(torch.ones(8))" \
    && rm -r "$TMPDIR"

# data/, lightning_logs/ and plots/ come below, of whoever runs it: 57439, the base image's user, or --user.
USER 0
WORKDIR /master_thesis
COPY *.py plots.ipynb ./
COPY figures/*.py figures/
COPY measures/*.py measures/
COPY run/*.py run/
RUN chmod -R a+rX . && chmod 777 .
USER 57439:57439

# A --user without a name and a home in the image: matplotlib, triton and torch keep their caches here.
ENV HOME=/tmp USER=$MAMBA_USER
ARG GIT_COMMIT=""
ENV GIT_COMMIT=$GIT_COMMIT
LABEL org.opencontainers.image.revision=$GIT_COMMIT
CMD ["python", "main.py", "--help"]
