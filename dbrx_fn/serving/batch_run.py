"""Runs a batch's requests through an engine, some hundreds at a time, and writes each answer when it is finished."""

import queue
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dbrx_fn.errors import DbrxError, EngineError
from dbrx_fn.serving.batch_lines import BatchInput, BatchRequest, custom_id, read_line
from dbrx_fn.serving.batch_output import BatchOutput
from dbrx_fn.serving.choice import Choice, Delta
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.openai_objects import Form, Object, Usage, status_of, told
from dbrx_fn.serving.request import Event, Failed, PromptRead
from dbrx_fn.serving.served_model import ServedModel

MOST_CHOICES = 128
"""Texts that one request may ask for."""

MOST_TEXTS = 256
"""Texts that are in the engine at once."""

Progress = Callable[[int, int], None]
"""Called with the numbers of lines answered and of tokens generated since the last call."""


@dataclass(eq=False)
class _Job:
    """A line in progress."""

    number: int
    name: str | None
    request: BatchRequest
    choices: list[Choice]
    parts: list[list[Delta]]
    numbers: list[int] = field(default_factory=list)
    cached: int = 0


class BatchRun:
    """One batch in progress.

    Attributes:
        failed: lines that were answered with an error.
    """

    def __init__(self, engine: Engine, model: ServedModel, output: BatchOutput, progress: Progress) -> None:
        self._engine, self._model, self._output, self._progress = engine, model, output, progress
        self._events: queue.SimpleQueue[tuple[_Job, int, Event]] = queue.SimpleQueue()
        self._jobs: set[_Job] = set()
        self.failed = 0

    def run(self, lines: BatchInput, seed: int | None) -> None:
        """Answers all lines that have no answer yet.

        Args:
            lines: the requests.
            seed: a request in line N without its own seed gets seed + N. If this is `None`, its seed is drawn.

        Raises:
            EngineError: if the engine can't go on. The finished answers are written.
            InputError: if an answer can't be written.
        """
        for number, content in lines.lines():
            if self._output.has(number):
                continue
            name = custom_id(content)
            try:
                request = read_line(content, self._model, None if seed is None else (seed + number) % 2**63)
            except DbrxError as error:
                self._fail(number, name, error)
                continue
            wanted = len(request.asked.requests)
            while self._jobs and self._open_texts() + wanted > MOST_TEXTS:
                self._take()
            self._begin(number, name, request)
        while self._jobs:
            self._take()

    def _open_texts(self) -> int:
        return sum(len(job.choices) for job in self._jobs)

    def _begin(self, number: int, name: str | None, request: BatchRequest) -> None:
        asked = request.asked
        echoes = asked.echoes or (None,) * len(asked.requests)
        choices = [
            Choice(one, self._model, asked.stop_strings, echoes[index // asked.n], prompt_only=asked.prompt_only)
            for index, one in enumerate(asked.requests)
        ]
        job = _Job(number, name, request, choices, [[] for _ in choices])
        try:
            for index, one in enumerate(asked.requests):
                job.numbers.append(self._engine.submit(one, self._receiver(job, index)))
        except EngineError:
            raise
        except DbrxError as error:
            self._cancel(job)
            self._fail(number, name, error)
        else:
            self._jobs.add(job)

    def _receiver(self, job: _Job, index: int) -> Callable[[Event], None]:
        return lambda event: self._events.put((job, index, event))

    def _take(self) -> None:
        """Takes the next event from the engine."""
        job, index, event = self._events.get()
        choice = job.choices[index]
        if job not in self._jobs or choice.ended:
            return
        if isinstance(event, Failed):
            if isinstance(event.error, EngineError):
                # The line isn't at fault, so it stays unanswered for the next run.
                raise event.error
            self._jobs.remove(job)
            self._cancel(job)
            self._fail(job.number, job.name, event.error)
            return
        if isinstance(event, PromptRead):
            job.cached += event.cached_tokens if index % job.request.asked.n == 0 else 0
            job.parts[index].append(choice.begin(event.logprobs))
            return
        job.parts[index].append(choice.push(event))
        self._progress(0, 1)
        if choice.ended and event.finish_reason is None:
            self._engine.cancel(job.numbers[index])
        if all(each.ended for each in job.choices):
            self._jobs.remove(job)
            self._finish(job)

    def _finish(self, job: _Job) -> None:
        asked = job.request.asked
        usage = Usage(
            prompt=sum(len(request.prompt) for request in asked.requests[:: asked.n]),
            cached=job.cached,
            made=sum(choice.made for choice in job.choices),
        )
        prefix = "cmpl" if job.request.kind == "completion" else "chatcmpl"
        form = Form(job.request.kind, f"{prefix}-{secrets.token_hex(12)}", int(time.time()), self._model)
        body = form.answer(job.parts, usage, asked)
        self._write(job.number, job.name, 200, body, None)

    def _fail(self, number: int, name: str | None, error: DbrxError) -> None:
        body = told(error)
        self.failed += 1
        self._write(number, name, status_of(error), body, {"code": body["error"]["code"], "message": str(error)})

    def _write(self, number: int, name: str | None, status: int, body: Object, error: Object | None) -> None:
        response = {"status_code": status, "body": body}
        self._output.write(number, {"custom_id": name, "line": number, "response": response, "error": error})
        self._progress(1, 0)

    def _cancel(self, job: _Job) -> None:
        for number in job.numbers:
            self._engine.cancel(number)
