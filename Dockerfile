# Serve a run: docker build -t loracle . && docker run -v $PWD/runs:/runs:ro -e LORACLE_TOKEN -p 8000:8000 loracle /runs/reviews
FROM python:3.11-slim

# The CPU build of torch is a tenth of the size of the default one, which includes CUDA.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install '.[serve,int8]' -c constraints.txt

# Downloads from hubs stay in /cache. Mount a volume there, unless you serve only 8-bit exports, which need no base model.
RUN useradd --uid 10001 --create-home loracle && install -d -o 10001 /cache
ENV LORACLE_CACHE=/cache/loracle HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1 MALLOC_ARENA_MAX=2
USER 10001
VOLUME /cache
EXPOSE 8000

# /readyz needs no token. Loading a base model takes a while, hence the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]

# 0.0.0.0 requires a token, in LORACLE_TOKEN or --token-file. SIGTERM finishes the requests in progress.
ENTRYPOINT ["loracle", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/runs/model"]
