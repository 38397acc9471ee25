"""The vLLM engine: AsyncLLM in this process, its EngineCore and workers in child processes.

::

    options        what `worker.engine_options` may say
    setup          version and environment variables, before the import
    compat         where vLLM versions differ, and nothing else
    async_llm      AsyncLLM with the token sink in place
    engine         implements ``workers.engines.base.Engine`` on AsyncLLM
    token_sink     takes the tokens of a step out of EngineCore's answer
    -- what follows runs in vLLM's own processes --
    plugin         loaded by vLLM everywhere: transfer engine, parent watchdog
    extension      methods of vLLM's worker: stage, read back, cure
    staging        reads a weights folder in the background, beside generation
    transfer       loads what was staged into the live model, layer by layer
    live_layout    where in the live parameters each published tensor is
    cpu_cures      faults of vLLM's CPU backend after a reload, mended

Everything but ``async_llm`` and ``transfer`` may be imported without vLLM.
"""
