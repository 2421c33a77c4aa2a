"""What was generated and how long it took, as `generate` tells it."""

from dataclasses import dataclass, field

from dbrx_fn.generation.stream import Piece


@dataclass
class Report:
    """The generated text and its times, as `--json` prints them. Times are in seconds, rates in tokens per second.

    `passes` is how often the model ran behind the prompt.
    """

    model: str
    seed: int
    prompt_tokens: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    passes: int = 0
    finish_reason: str = "interrupted"
    load_time: float = 0.0
    warm_up_time: float = 0.0
    time_to_first_token: float | None = None
    prompt_rate: float | None = None
    generation_rate: float | None = None
    peak_memory: int = 0
    processes: int = 1

    def note(self, piece: Piece, elapsed: float) -> None:
        """Counts a piece that came `elapsed` seconds after the start."""
        self.tokens.append(piece.token)
        self.text += piece.text
        if self.time_to_first_token is None:
            self.time_to_first_token = elapsed
            self.prompt_rate = self.prompt_tokens / elapsed
        else:
            self.generation_rate = (len(self.tokens) - 1) / (elapsed - self.time_to_first_token)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason

    def summary(self, *, drawn: bool, speculated: bool) -> str:
        """The main figures as a small table. For `drawn` text it includes the seed that draws it again."""
        return "\n".join(
            (
                f"prompt          {self.prompt_tokens:8d} tokens  {_rate(self.prompt_rate)}",
                f"generation      {len(self.tokens):8d} tokens  {_rate(self.generation_rate)}",
                *([f"passes          {self.passes:8d}"] if speculated else []),
                f"first token     {_seconds(self.time_to_first_token)}",
                f"warm-up         {_seconds(self.warm_up_time)}",
                f"loading         {_seconds(self.load_time)}",
                f"peak memory     {self.peak_memory / 2**30:8.2f} GiB",
                f"finish reason   {self.finish_reason}",
                *([f"seed            {self.seed}"] if drawn else []),
            )
        )


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:10.1f} tokens/s"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:8.2f} s"
