# The web page of imgcap: docker build -t imgcap . && docker run --rm -p 127.0.0.1:8000:8000 imgcap
FROM python:3.12-slim AS build
WORKDIR /src
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY imgcap_jax imgcap_jax
COPY experiments experiments
RUN python -m venv /opt/imgcap && \
    /opt/imgcap/bin/pip install --no-cache-dir -c constraints.txt ".[web]"

FROM python:3.12-slim
COPY --from=build /opt/imgcap /opt/imgcap
RUN useradd --create-home --uid 10001 imgcap
USER imgcap
ENV PATH=/opt/imgcap/bin:$PATH
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz')"]
# More names under which it is reached: docker run ... imgcap --allowed-host captions.example.org
ENTRYPOINT ["imgcap", "serve", "--host", "0.0.0.0", "--allowed-host", "localhost", "--allowed-host", "127.0.0.1"]
