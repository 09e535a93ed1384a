"""``kcache chat``: talk to a model, at a terminal or through a pipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kcache.errors import InputError
from kcache_cli.exits import note
from kcache_cli.options import ModelOptions, PolicyOptions, SamplingOptions, with_options
from kcache_cli.watching import WatchOptions, watching

DEFAULT_MAX_TOKENS = 1024


@with_options
def chat(
    context: typer.Context,
    model_options: ModelOptions,
    system: Annotated[str | None, typer.Option("-s", "--system", metavar="TEXT", help="System message.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("-n", "--max-tokens", min=1, metavar="INTEGER", help="Longest answer.", show_default="1024"),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "-f", "--file", metavar="FILE", help="A document, put before the first question; again for another one."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer.")] = False,
    *,
    sampling_options: SamplingOptions,
    policy_options: PolicyOptions,
    watch_options: WatchOptions,
) -> None:
    """Talk to a model.

    At a terminal this is a conversation: /help lists its commands, Ctrl-C stops a reply, Ctrl-D leaves. With standard
    input piped, the whole of it is one message: the answer goes to standard output, everything else to standard error.

    Examples
    --------
      kcache chat
      kcache chat -f report.txt -f notes.txt --topn 128
      kcache chat -f report.txt --dashboard
      echo "What is a KV cache?" | kcache chat --temperature 0
      kcache chat Qwen/Qwen3-8B --kv-budget 8GiB --ctx 32768
    """
    from kcache_cli.chat.conversation import Conversation
    from kcache_cli.chat.repl import Repl, answer_once
    from kcache_cli.console import working
    from kcache_cli.engine import engine_of, load_with_bar, make_way
    from kcache_cli.paths import history_file
    from kcache_cli.policies import build_policy
    from kcache_cli.settings import fill, load_settings

    settings = load_settings()
    model, sampling = fill(model_options, settings), fill(sampling_options, settings)
    policy = build_policy(policy_options, settings)
    watch_options.check()
    model.check()
    planned = policy_options.ctx or settings.ctx
    document = "\n\n".join(read_document(file).rstrip() for file in files) if files else None
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    message = "" if at_terminal else read_message()
    make_way()
    engine = engine_of(context)
    overflow = policy_options.allow_overflow
    with working(f"loading {model.name}"):
        chosen = engine.sampling(sampling)
        plan = engine.plan(model, policy, ctx=planned, batch_size=1, allow_overflow=overflow)
    lm = load_with_bar(engine, model)
    for remark in engine.remarks(lm, sampling_options, chosen):
        note(remark)
    session = engine.session(
        lm,
        policy,
        system=settings.system if system is None else system,
        sampling=chosen,
        max_length=planned,
        allow_overflow=overflow,
    )
    length = max_tokens or settings.max_tokens or DEFAULT_MAX_TOKENS
    shown = watch_options.dashboard
    once = not (at_terminal or shown)
    conversation = Conversation(session, model.name, length, plan.host_only, document, quiet=shown, once=once)
    conversation.check_document()
    if planned is not None and document is not None and (tokens := session.prompt_tokens(document)) >= planned:
        note(f"the document is {tokens:,} tokens; more memory is taken than for {planned:,}")
    with watching(engine, lm, "chat", watch_options) as publication:
        if shown and publication is not None:
            from kcache_cli.chat.prompt import open_history
            from kcache_cli.ending import show
            from kcache_cli.tui.conversation import Conversing
            from kcache_cli.tui.start import dashboard

            talk = Conversing(conversation, open_history(history_file()))
            try:
                show(dashboard(publication.source(), talk=talk))
            finally:
                talk.print_all()
            return
        if not at_terminal:
            answer_once(conversation, message, as_json)
            return
        from kcache_cli.chat.prompt import Prompt

        Repl(conversation, Prompt(history_file()).read, as_json).run()


def read_document(path: Path) -> str:
    """Read the file given with ``-f``.

    Raises
    ------
    InputError
        If it cannot be read, is not text, or is empty.
    """
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"-f {path}: cannot be read: {error.strerror or error}") from None
    text = _decode(data, f"-f {path}")
    if not text.strip():
        raise InputError(f"-f {path}: is empty")
    return text


def read_message() -> str:
    """Read the message on standard input.

    Raises
    ------
    InputError
        If it is not text, or is empty.
    """
    text = _decode(sys.stdin.buffer.read(), "standard input") if sys.stdin is not None else ""
    if not text.strip():
        raise InputError(
            "standard input is no terminal to type at, and empty; pipe a message in (echo 'What is a KV cache?' | "
            "kcache chat), or give kcache a terminal (docker run -it, ssh -t)"
        )
    return text.strip("\n")


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: is not UTF-8 text (byte {error.start + 1}); convert it first") from None
