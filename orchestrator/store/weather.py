"""What an S3 failure means: try again, or one line for the user.

Invariant: no credential is in any line. Text that came from the server or from botocore is used only
if fimo has no words of its own, and only after `scrub`.

Not here: when to retry and for how long (`s3.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_SECRETS = re.compile(
    r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{8,}\b"  # access key ids, by AWS's own prefixes
    r"|(?<=://)[^/@\s]+(?=@)"  # user:password@ in a URL
    r"|(?i:(?:credential|signature|security-token|secret|password|token|access_?key(?:_?id)?)\s*[=:]\s*)[^\s&,;'\"]+"
)


def scrub(text: str, secrets: Iterable[str | None] = ()) -> str:
    """`text` in one line of at most 300 characters, without `secrets` or anything shaped like one."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    line = " ".join(_SECRETS.sub("***", text).split())
    return line if len(line) <= 300 else line[:299] + "…"


@dataclass(frozen=True)
class Verdict:
    """How to take one failed request: whether trying again may help, and what to tell the user if not."""

    again: bool
    line: str


# S3's error codes, https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_AGAIN_CODES = {
    "SlowDown": "the server asks to slow down (throttling)",
    "Throttling": "the server asks to slow down (throttling)",
    "ThrottlingException": "the server asks to slow down (throttling)",
    "TooManyRequests": "the server asks to slow down (throttling)",
    "RequestLimitExceeded": "the server asks to slow down (throttling)",
    "ServiceUnavailable": "the server is unavailable",
    "InternalError": "the server reports an internal error",
    "RequestTimeout": "the server timed out waiting for the request",
    "ConditionalRequestConflict": "writes of the same key conflict",
    "OperationAborted": "writes of the same key conflict",
    "BadDigest": "data was damaged on the way to the server",
    "XAmzContentSHA256Mismatch": "data was damaged on the way to the server",
    "IncompleteBody": "data was cut off on the way to the server",
}

_REFUSED = "its credentials are refused: correct the access key and secret (AWS_ACCESS_KEY_ID, AWS_PROFILE, …)"
_EXPIRED = "its credentials have expired: renew them, then run `fimo resume`; nothing committed is lost"
_REGION = "the bucket is in another region or at another endpoint: set AWS_REGION or AWS_ENDPOINT_URL_S3"
_DENIED = "access is denied: give these credentials a policy like those in deploy/aws"
_UNCONDITIONAL = "the server lacks conditional writes (If-None-Match), which fimo needs: use AWS S3 or another"
_NO_CREDENTIALS = (
    "no credentials found: set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or attach a role"
)

_FATAL_CODES = {
    "InvalidAccessKeyId": _REFUSED,
    "SignatureDoesNotMatch": _REFUSED,
    "InvalidToken": _REFUSED,
    "InvalidSecurity": _REFUSED,
    "UnrecognizedClientException": _REFUSED,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": "this machine's clock differs from the server's by more than 15 minutes: set it",
    "RequestExpired": "this machine's clock differs from the server's by more than 15 minutes: set it",
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": _DENIED,
    "403": _DENIED,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "301": _REGION,
    "NotImplemented": _UNCONDITIONAL,
    "501": _UNCONDITIONAL,
    "NoSuchBucket": "the bucket does not exist: create it, or correct the name in --store",
    "InvalidBucketName": "the bucket does not exist: create it, or correct the name in --store",
    "EntityTooLarge": "the object is larger than the server takes in one write",
    "QuotaExceeded": "the store's quota is used up: raise it, then run `fimo resume`",
    "XMinioStorageFull": "the server's disk is full: free some space, then run `fimo resume`",
    "KeyTooLongError": "the store's prefix is too long: choose a shorter --store",
}

# botocore's exceptions by the name of the class or of a base class, so that this module needs no botocore.
_AGAIN_EXCEPTIONS = {
    "EndpointConnectionError": "the endpoint cannot be reached",
    "ConnectTimeoutError": "the endpoint cannot be reached in time",
    "ProxyConnectionError": "the HTTP proxy cannot be reached",
    "ReadTimeoutError": "the server did not answer in time",
    "ConnectionClosedError": "the connection was cut",
    "ResponseStreamingError": "the connection was cut",
    "IncompleteReadError": "the answer was cut off",
    "ProtocolError": "the connection was cut",
    "FlexibleChecksumError": "data was damaged on the way from the server",
    "HTTPClientError": "the connection failed",
    "ResponseParserError": "the server's answer makes no sense (is this an S3 endpoint?)",
}
_FATAL_EXCEPTIONS = {
    "SSLError": "the server's TLS certificate is not accepted: correct the endpoint or AWS_CA_BUNDLE",
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": "its credentials are incomplete: set both the access key and the secret",
    "CredentialRetrievalError": "its credentials cannot be had from their source: check the profile or role",
    "MetadataRetrievalError": "its credentials cannot be had from their source: check the profile or role",
    "TokenRetrievalError": _EXPIRED,
    "SSOError": _EXPIRED,
    "LoginError": _EXPIRED,
    "ProfileNotFound": "the profile named by AWS_PROFILE is not in the AWS config: correct it",
    "NoRegionError": "no region is set: set AWS_REGION",
    "InvalidRegionError": "AWS_REGION is not a region: correct it",
    # If a redirect names no region, botocore asks for it, is redirected again, and so on until the stack is full.
    "RecursionError": _REGION,
    "ConfigParseError": "the AWS config file cannot be read: correct it",
    "InvalidEndpointConfigurationError": "AWS_ENDPOINT_URL is not a URL: correct it (http://host:port)",
}


def judge(error: Exception, secrets: Iterable[str | None] = ()) -> Verdict:
    """The verdict on what boto3 raised."""
    response: dict[str, Any] | None = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        return _judge_answer(response, secrets)
    if "maximum recursion depth" in str(error):
        # Look at the text, not the type: what botocore wraps a RecursionError in depends on how deep the stack was.
        return Verdict(False, _FATAL_EXCEPTIONS["RecursionError"])
    for kind in type(error).__mro__:
        if kind.__name__ in _FATAL_EXCEPTIONS:
            return Verdict(False, _FATAL_EXCEPTIONS[kind.__name__])
        if kind.__name__ in _AGAIN_EXCEPTIONS:
            return Verdict(True, _AGAIN_EXCEPTIONS[kind.__name__])
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return Verdict(False, _FATAL_EXCEPTIONS["InvalidEndpointConfigurationError"])
    return Verdict(False, scrub(f"{type(error).__name__}: {error}", secrets))


def _judge_answer(response: dict[str, Any], secrets: Iterable[str | None]) -> Verdict:
    code = str(response["Error"].get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _FATAL_CODES:
        return Verdict(False, _FATAL_CODES[code])
    if code in _AGAIN_CODES:
        return Verdict(True, _AGAIN_CODES[code])
    if status in (409, 429, 500, 502, 503, 504):
        return Verdict(True, f"the server answers HTTP {status}")
    message = response["Error"].get("Message", "")
    if code == str(status):  # no code in the body, which S3 always sends
        return Verdict(False, f"the server answers HTTP {status} and not as S3 does: check AWS_ENDPOINT_URL")
    return Verdict(False, scrub(f"the server answers HTTP {status} {code}: {message}", secrets))
