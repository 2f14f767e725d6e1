"""Composition root: builds storage, queue, engine processes and HTTP application."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from alphalayer import __version__, catalog
from alphalayer.api import docs, errors, jobs, ops, playground
from alphalayer.api.a1111 import routes as a1111
from alphalayer.api.addresses import ALL_ADDRESSES, KnownHosts, address, find_names, origin
from alphalayer.api.auth import Authenticator
from alphalayer.api.deps import Service
from alphalayer.api.document_files import DocumentFiles
from alphalayer.api.file_urls import UrlSigner
from alphalayer.api.guard import GuardedApp
from alphalayer.api.middleware.body_limit import BodyLimit
from alphalayer.api.middleware.cross_site import CrossSiteCheck
from alphalayer.api.middleware.forwarded import ForwardedHeaders
from alphalayer.api.middleware.hosts import HostCheck, OwnAddress
from alphalayer.api.middleware.request_log import RequestLog
from alphalayer.api.middleware.security_headers import SecurityHeaders
from alphalayer.api.middleware.turns import Turns
from alphalayer.api.native import routes as native
from alphalayer.api.openai import routes as openai
from alphalayer.api.pixel_pool import PixelPool
from alphalayer.api.shutdown import Shutdown
from alphalayer.auth import usage
from alphalayer.auth.api_keys import Key
from alphalayer.auth.store import ApiKeyStore
from alphalayer.config import Settings
from alphalayer.core.control_groups import cpu_quota, memory_limit
from alphalayer.core.errors import AlphalayerError, SetupFailed
from alphalayer.core.optional_dependencies import install_hint, require
from alphalayer.jobs import lock
from alphalayer.jobs.base import Jobs, OnOutcome, Outcome, ignore_outcome
from alphalayer.jobs.outcomes import record_outcome
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.observability.background import keep_running
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics
from alphalayer.observability.tracing import Traces
from alphalayer.service.gpus import engine_environments
from alphalayer.service.health import Health, ModelLookup, StorageProbe
from alphalayer.service.pool import WorkerPool
from alphalayer.service.retention import Limits, keep_sweeping
from alphalayer.service.webhooks import Webhooks, check_url, read_secret
from alphalayer.storage.objects import ObjectStorage, check_bucket, open_storage
from alphalayer.worker.render import ENGINE
from alphalayer.worker.supervisor import EngineSpec, Supervisor

DESCRIPTION = "Text in, transparent PNG out: Stable Diffusion XL with LayerDiffuse."
DIALECTS = (native.DIALECT, jobs.DIALECT, a1111.DIALECT, openai.DIALECT)
JOURNAL = "jobs.sqlite"
MAX_IMAGE_MEMORY, MAX_IMAGE_THREADS = 250_000_000, 2
"""Bounds of the defaults for work on images in the service's process."""
EXPOSED = ("Location", "Retry-After", "X-Request-ID")
"""Headers that a page of another origin may read."""


@dataclass(frozen=True)
class Parts:
    """Parts of one running service."""

    service: Service
    job_queue: Jobs
    pool: WorkerPool
    probe: StorageProbe
    webhooks: Webhooks | None
    key_usage: usage.KeyUsage


def create_app(
    settings: Settings, *, engine: str = ENGINE, engine_options: dict[str, Any] | None = None
) -> FastAPI:
    """Create the ASGI application.

    Args:
        settings: Settings of the service.
        engine: "module:function" that creates the engine in its own process.
        engine_options: Arguments of the function besides those from the settings.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        options = {**settings.engine_options(), **(engine_options or {})}
        parts = await _assemble(settings, engine, options, traces)
        app.state.service = parts.service
        app.state.parts = parts
        app.state.shutdown = parts.service.shutdown
        try:
            async with _running(parts, settings), dialects_lifespan(app):
                yield
        finally:
            await asyncio.to_thread(send_traces)

    app = FastAPI(
        title="Alphalayer",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(ops.router)
    errors.install(app, {dialect.prefix: dialect.render_error for dialect in DIALECTS})
    traces, send_traces = _trace(app) if settings.tracing else (Traces(), lambda: None)
    dialects_lifespan = (
        _add_dialects(app, settings) if settings.role != "worker" else contextlib.nullcontext
    )
    _add_middleware(app, settings)
    return app


@contextlib.asynccontextmanager
async def _running(parts: Parts, settings: Settings) -> AsyncGenerator[None]:
    """Run the background work of a service. At the end, close its parts.

    Running jobs get time to complete, and the rest returns to the queue.
    """
    limits = Limits(
        settings.keep_pictures_days, settings.keep_pictures_bytes, settings.keep_jobs_days
    )
    work = parts.pool.tasks
    work["sweep"] = partial(keep_sweeping, parts.service.storage, parts.job_queue, limits)
    work["key_usage"] = parts.key_usage.run
    work["storage"] = parts.probe.run
    if parts.webhooks:
        work["webhooks"] = parts.webhooks.run
    running = [asyncio.create_task(keep_running(name, run)) for name, run in work.items()]
    _log_start(settings)
    try:
        yield
    finally:
        shutdown = parts.service.shutdown
        shutdown.begin()
        await parts.pool.drain(shutdown.left_s)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await parts.pool.requeue_running()
        await parts.job_queue.close()
        parts.service.pixels.close()


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """Add the middleware. The one that is added last is the outermost."""
    hosts = _known_hosts(settings)
    app.add_middleware(BodyLimit, limit=settings.max_request_bytes)
    app.add_middleware(OwnAddress, hosts=hosts)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=EXPOSED,
        )
    own = [origin(settings.public_url)] if settings.public_url else []
    app.add_middleware(CrossSiteCheck, allowed=[*settings.allowed_origins, *own])
    # a page can send X-Forwarded-Host itself, but not Host: both must be known
    app.add_middleware(HostCheck, hosts=hosts)
    app.add_middleware(ForwardedHeaders, trusted=settings.trusted_proxies)
    app.add_middleware(HostCheck, hosts=hosts)
    app.add_middleware(Turns)
    app.add_middleware(RequestLog)
    app.add_middleware(SecurityHeaders)


def _known_hosts(settings: Settings) -> KnownHosts:
    """Return the host names that the service answers to."""
    pod = os.environ.get("RUNPOD_POD_ID")
    names = find_names(settings.host, settings.port, settings.public_url, pod)
    # every page may use the service then, whatever its name: a check would protect nothing
    every = ["*"] if "*" in settings.allowed_origins else []
    return KnownHosts([*names, *settings.allowed_names, *every])


_Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


def _add_dialects(app: FastAPI, settings: Settings) -> _Lifespan:
    """Add the dialects, the pages and the MCP tool.

    Returns:
        The context to enter while the application serves.
    """
    for dialect in DIALECTS:
        app.include_router(dialect.router)
    docs.install(app)
    playground.install(app)
    return _mount_mcp(app, settings)


def _trace(app: FastAPI) -> tuple[Traces, Callable[[], None]]:
    """Trace the application. Return its traces and the function that sends the rest.

    Raises:
        SetupFailed: A package is missing.
    """
    try:
        from alphalayer.service import otlp
    except ImportError as error:
        raise SetupFailed(f"tracing needs {error.name}.", hint=install_hint("tracing")) from None
    provider = otlp.install(app)
    return Traces(provider), provider.shutdown


def _mount_mcp(app: FastAPI, settings: Settings) -> _Lifespan:
    """Mount the MCP endpoint if its package is installed. Return its lifespan."""
    try:
        from alphalayer.integrations import mcp
    except ImportError as error:
        log.info(
            "mcp.disabled",
            path="/mcp/",
            missing=error.name,
            hint=install_hint("mcp"),
        )
        return contextlib.nullcontext
    server = mcp.create_server(mcp.connect_to_caller, partial(mcp.outside, settings.public_url))
    # HostCheck and CrossSiteCheck protect it with all other routes
    tool = server.http_app("/", stateless_http=True, host_origin_protection=False)
    app.mount(mcp.PATH, GuardedApp(tool, "generate"))
    return tool.lifespan


async def check(settings: Settings) -> None:
    """Check storage, queue and settings before a start. No job changes.

    Raises:
        AlphalayerError: The service cannot start with these settings.
    """
    if settings.role != "api":
        require("torch", "engine")
    _open_storage(settings)
    if settings.storage and settings.role != "api":
        await asyncio.to_thread(check_bucket, settings.storage)
    _open_api_keys(settings)
    _webhook_key(settings)
    _check_default_model(settings)
    if settings.database is None:
        await lock.check(settings.data_dir / JOURNAL)
    else:
        await (await _open_job_queue(settings, {}, ignore_outcome)).close()


def _open_storage(settings: Settings) -> ObjectStorage:
    """Open the storage of images. Raises `SetupFailed` or `StorageFailed`."""
    settings.check_folders()
    return open_storage(settings.image_location)


def _check_default_model(settings: Settings) -> None:
    """Check that the engines of this service can use the default model.

    Raises:
        SetupFailed: The model is missing or unusable.
    """
    if not settings.default_model or settings.role == "api":
        return
    try:
        catalog.resolve_model(
            settings.default_model, catalog.find_models(settings.models_dir), settings.models_dir
        )
    except AlphalayerError as error:
        raise SetupFailed(f"setting default_model: {error.message}", hint=error.hint) from None


def _open_api_keys(settings: Settings) -> ApiKeyStore:
    """Load the API keys and users. Raises `SetupFailed`."""
    users = settings.api_auth.get_secret_value() if settings.api_auth else ""
    return ApiKeyStore(
        settings.keys_file, users, is_required="keys_file" in settings.model_fields_set
    )


def _webhook_key(settings: Settings) -> bytes | None:
    secret = settings.webhook_secret.get_secret_value() if settings.webhook_secret else ""
    return read_secret(secret) if secret else None


def _url_signer(settings: Settings) -> UrlSigner | None:
    secret = settings.sign_file_urls
    if secret is None:
        return None
    return UrlSigner(secret.get_secret_value().encode(), settings.signed_url_s)


async def _open_job_queue(
    settings: Settings, shares: Mapping[str, float], on_outcome: OnOutcome
) -> Jobs:
    """Open the queue of this machine, or the shared one. Raises `SetupFailed`."""
    if settings.database is None:
        return await SqliteJobQueue.open(
            settings.data_dir / JOURNAL, settings.queue_limit, shares, on_outcome
        )
    try:
        from alphalayer.jobs.postgres import PostgresJobQueue
    except ImportError as error:
        raise SetupFailed(
            f"a shared queue needs {error.name}.", hint=install_hint("shared")
        ) from None
    return await PostgresJobQueue.open(
        settings.database.get_secret_value(),
        settings.queue_limit,
        shares,
        settings.role,
        on_outcome,
    )


async def _assemble(
    settings: Settings, engine: str, options: dict[str, Any], traces: Traces
) -> Parts:
    """Build the parts of the service and open its queue."""
    storage = _open_storage(settings)
    keys = _open_api_keys(settings)
    if settings.role != "worker":
        _log_access(settings, keys.keys())
    key_usage = usage.KeyUsage(settings.data_dir / usage.FILE)
    metrics = Metrics()
    probe = StorageProbe(storage)

    def on_outcome(job_id: str, outcome: Outcome) -> None:
        record_outcome(metrics, job_id, outcome)
        probe.record_outcome(outcome)

    job_queue = await _open_job_queue(settings, keys.shares, on_outcome)
    metrics.queue_length.set_function(lambda: job_queue.queue_length)
    metrics.queue_age.set_function(lambda: job_queue.oldest_waiting_s)
    pool = _create_pool(settings, engine, options, job_queue, metrics, traces)
    shutdown = _create_shutdown(settings, pool)
    models = _model_lookup(settings)
    health = _create_health(pool, shutdown, models, job_queue, probe)
    url_signer = _url_signer(settings)
    webhooks = _create_webhooks(settings, job_queue, metrics, url_signer)
    service = Service(
        job_queue=job_queue,
        storage=storage,
        models_dir=settings.models_dir,
        embeddings_dir=settings.embeddings,
        list_models=models.list,
        readiness=health.readiness,
        metrics=metrics,
        authenticator=Authenticator(keys.keys, key_usage.record),
        shutdown=shutdown,
        pixels=_create_pixel_pool(settings, metrics),
        # a container often has its system folder in memory
        documents=DocumentFiles(
            settings.data_dir if os.access(settings.data_dir, os.W_OK) else None
        ),
        requires_key=lambda: keys.keys() is not None,
        default_model=settings.default_model,
        max_pixels=settings.max_request_pixels,
        max_cost=settings.max_request_cost,
        knows_models=models.knows_models,
        noise=settings.noise,
        decode=settings.decode,
        prompt_comments=settings.prompt_comments,
        public_url=settings.public_url,
        log_prompts=settings.log_prompts,
        redirect_files=settings.redirect_files,
        url_signer=url_signer,
        check_webhook=partial(check_url, allow_private=settings.webhook_allow_private)
        if webhooks
        else None,
    )
    return Parts(service, job_queue, pool, probe, webhooks, key_usage)


def _create_pool(
    settings: Settings,
    engine: str,
    options: dict[str, Any],
    job_queue: Jobs,
    metrics: Metrics,
    traces: Traces,
) -> WorkerPool:
    """Return the supervisors of all engine processes. The role "api" has none."""
    logs = {"level": settings.log_level, "as_json": settings.log_json}
    environments = engine_environments(settings.device) if settings.role != "api" else {}
    return WorkerPool(
        [
            Supervisor(
                name,
                EngineSpec(
                    engine,
                    options,
                    settings.image_location,
                    environment,
                    settings.silence_limit_s,
                    settings.batch_wait_s,
                    logs,
                ),
                job_queue,
                metrics,
                traces,
            )
            for name, environment in environments.items()
        ]
    )


def _create_shutdown(settings: Settings, pool: WorkerPool) -> Shutdown:
    """Return the shutdown of a service, which has not begun."""
    return Shutdown(
        settings.drain_s,
        pool.stop_accepting,
        pool.is_running,
        is_shared=settings.database is not None,
    )


def _create_health(
    pool: WorkerPool,
    shutdown: Shutdown,
    models: ModelLookup,
    job_queue: Jobs,
    probe: StorageProbe,
) -> Health:
    """Return the readiness of a service with these parts."""
    return Health(
        pool,
        shutdown,
        lambda: job_queue.problem or probe.problem,
        models.default,
        models.has_engines,
    )


def _create_webhooks(
    settings: Settings, job_queue: Jobs, metrics: Metrics, url_signer: UrlSigner | None
) -> Webhooks | None:
    """Return the delivery of webhooks, or None without a secret."""
    secret = _webhook_key(settings)
    if secret is None:
        return None
    return Webhooks(
        job_queue,
        metrics,
        secret,
        allow_private=settings.webhook_allow_private,
        url_signer=url_signer,
    )


def _create_pixel_pool(settings: Settings, metrics: Metrics) -> PixelPool:
    """Return the pool for work on images. It leaves CPUs and memory to the rest."""
    cpus = cpu_quota() or os.cpu_count() or 1
    limit = memory_limit()
    default = min(MAX_IMAGE_MEMORY, limit // 4) if limit else MAX_IMAGE_MEMORY
    pool = PixelPool(
        settings.image_memory_bytes or default, min(MAX_IMAGE_THREADS, max(1, int(cpus) // 2))
    )
    metrics.pixel_queue_length.set_function(lambda: pool.waiting)
    metrics.pixel_memory.set_function(lambda: pool.used_bytes)
    return pool


def _model_lookup(settings: Settings) -> ModelLookup:
    """Return the models that this service knows of."""
    return ModelLookup(settings.models_dir, settings.default_model, settings.role != "api")


def _log_start(settings: Settings) -> None:
    """Log the addresses of the service and its default model."""
    is_everywhere = settings.host in ("0.0.0.0", "::")  # nosec B104 # a comparison
    host = "localhost" if is_everywhere else settings.host
    base = (settings.public_url or address(host, settings.port)).rstrip("/")
    model, problem = _model_lookup(settings).default()
    if problem:
        log.warning("model.missing", error=problem)
    if settings.database and "://" not in settings.image_location:
        hint = "Set storage to a bucket (s3://…), unless all machines share this folder."
        log.warning("storage.local_with_shared_queue", folder=settings.image_location, hint=hint)
    if settings.role == "worker":
        paths = {"livez": "/livez", "metrics": "/metrics"}
    else:
        paths = {"page": "/", "docs": "/docs", "health": "/sdapi/v1/sd-models"}
    urls = {name: base + path for name, path in paths.items()}
    log.info("service.started", **urls, model=model)


def _log_access(settings: Settings, keys: list[Key] | None) -> None:
    """Log a warning if every client has access, or none."""
    hint = "Create a key with: alphalayer keys add NAME"
    if keys is None and settings.host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("auth.disabled", host=settings.host, hint=hint)
        names = _known_hosts(settings).names
        if "*" not in names:
            other = "Other names, such as that of a proxy, need the setting allowed_hosts."
            log.info("hosts.limited", hosts=["IP addresses", *names], hint=other)
    elif keys == []:
        log.warning("auth.no_keys", keys_file=str(settings.keys_file), hint=hint)
    if (
        keys
        and settings.host in ALL_ADDRESSES
        and not (settings.public_url or settings.allowed_names or "*" in settings.allowed_origins)
    ):
        other = "If clients reach the service by a name, set public_url or allowed_hosts."
        log.warning("hosts.not_set", host=settings.host, hint=other)
