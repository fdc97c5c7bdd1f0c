"""The configuration of annotation: what is annotated, by whom, where the output goes."""

import os
from dataclasses import dataclass, field

from thinkmid.augment.annotators import AnnotatorConfig
from thinkmid.augment.split import SplitConfig
from thinkmid.errors import at_least, positive
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling


@dataclass(frozen=True, kw_only=True)
class AnnotateRun:
    """Where the output goes."""

    folder: str  # everything the run writes; the same command resumes what is there
    parts: int = 16  # files of each kind; at least as many as jobs
    progress_s: float = 30.0  # between lines of progress

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= 9999:
            raise ValueError(f"parts must lie in 1..9999, got {self.parts}")


@dataclass(frozen=True, kw_only=True)
class AnnotateData:
    """What is annotated."""

    # jsonl, parquet, arrow, txt files or folders, or hf://datasets/ORG/NAME[@REVISION][/PATH]
    paths: tuple[str, ...]
    column: str = "text"  # of rows, the field that holds the text

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty; --data.paths FILE or FOLDER")


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """How documents are cut."""

    tokenizer: str  # folder of the model to be trained, or its name on the Hub: its tokens are counted
    max_tokens: int = 2048  # L: of a chunk, without thoughts; cut at paragraph or sentence ends

    def __post_init__(self) -> None:
        at_least(self, max_tokens=1)


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Where the annotator's model answers."""

    url: str = ""  # where /chat/completions lies, up to /v1
    model: str = ""  # its name there
    key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; may be unset
    workers: int = 32  # requests on their way at a time
    timeout_s: float = 300.0  # for one try, first to last byte
    # further tries after a timeout, a broken connection, HTTP 408, 409, 425, 429 or 5xx; the pauses between them are
    # 0.5 s, 1 s, ... 8 s, or Retry-After: together nearly a minute
    retries: int = 10
    temperature: float = 0.8
    max_tokens: int = 4096  # of one answer
    price_prompt: float = 0.0  # per million tokens, for the report
    price_written: float = 0.0  # per million tokens, for the report

    def __post_init__(self) -> None:
        at_least(self, workers=1, retries=0, max_tokens=1, temperature=0)
        positive(self, "timeout_s")


@dataclass(frozen=True, kw_only=True)
class WriterConfig:
    """The annotator's model, for kind 'engine'."""

    # Hugging Face folder, or name on the Hub, of a model that follows instructions; its chat template is used
    folder: str = ""
    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 4096  # of one answer
    max_batch: int = 256  # answers written at a time
    seed: int = 0  # a try's draws depend on this, its chunk and its number alone
    thinking: bool = False  # templates that know enable_thinking: the model reasons before it answers

    def __post_init__(self) -> None:
        at_least(self, max_tokens=1, max_batch=1, seed=0)
        _ = self.sampling  # has checks of its own

    @property
    def sampling(self) -> Sampling:
        """An answer is one piece up to its end: see engine.blind()."""
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, max_think=self.max_tokens, max_suffix=0,
            max_batch=self.max_batch,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Annotation."""

    shard: str = ""  # i/n: this job takes the parts i, i+n, ...; empty: RANK and WORLD_SIZE, or everything
    run: AnnotateRun
    data: AnnotateData
    chunks: ChunkConfig
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    writer: WriterConfig = field(default_factory=WriterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    split: SplitConfig = field(default_factory=SplitConfig)

    def __post_init__(self) -> None:
        _, jobs = share(self.shard)
        if jobs > self.run.parts:
            raise ValueError(f"{jobs} jobs for {self.run.parts} parts: raise run.parts")
        for name in ("url", "model"):
            if self.annotator.kind == "openai" and not getattr(self.endpoint, name):
                raise ValueError(f"annotator.kind 'openai' needs endpoint.{name}")
        if self.annotator.kind == "engine" and not self.writer.folder:
            raise ValueError("annotator.kind 'engine' needs writer.folder")
        if self.engine.tensor_parallel > 1:
            raise ValueError(
                f"engine.tensor_parallel {self.engine.tensor_parallel}: here each rank has an engine of its own; serve "
                f"a larger model and use annotator.kind 'openai'"
            )


def share(shard: str) -> tuple[int, int]:
    """(job, jobs) from "i/n", else from torchrun's environment."""
    told = shard or f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    first, slash, second = told.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"shard must be i/n with i in 0..n-1, got {told!r}")
    return int(first), int(second)
