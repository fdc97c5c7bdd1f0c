"""The annotator's model behind an OpenAI-compatible endpoint: many chunks at a time, outcomes as they come."""

from collections.abc import Generator, Iterator
from contextlib import closing

from thinkmid.augment.annotators import AnnotatorConfig, Outcome, Reply, Unanswered, by_model
from thinkmid.augment.config import EndpointConfig
from thinkmid.augment.pool import through_pool
from thinkmid.augment.shards import Piece
from thinkmid.errors import UserError
from thinkmid.rollout.endpoint import Completion, Endpoint, EndpointError
from thinkmid.run.interrupt import Interrupt

PROBE = "Reply with the word yes."  # an endpoint that rejects this too is not put off by a chunk


class EndpointAnnotator:
    """Thoughts by a model behind an endpoint."""

    def __init__(self, cfg: AnnotatorConfig, endpoint: EndpointConfig, interrupt: Interrupt):
        self._cfg, self._config, self._interrupt = cfg, endpoint, interrupt
        self._endpoint = Endpoint(
            endpoint.url, endpoint.model, endpoint.key_env, timeout_s=endpoint.timeout_s, retries=endpoint.retries
        )
        self._answered = False
        self.model: dict[str, str] = {}
        self.failures = self._endpoint.failures
        self.patience = 2 * endpoint.workers + 8

    def outcomes(self, pieces: Iterator[Piece]) -> Generator[tuple[Piece, Outcome]]:
        """Pieces with what became of them; once interrupted, those that were on their way. Closes the endpoint."""
        with closing(self):
            yield from through_pool(pieces, self.annotate, self._config.workers, self._interrupt, self.close)

    def annotate(self, chunk: str) -> Outcome:
        return by_model(chunk, self._cfg, self.write)

    def close(self) -> None:
        """Cancels what is on its way, which then has no response."""
        self._endpoint.close()

    def write(self, prompt: str) -> Reply:
        """The reply. Unanswered after the last try; UserError if the endpoint rejects whatever it is asked."""
        written = self._ask(prompt)
        if isinstance(written, Completion):
            self._answered = True
            return Reply(written.text, written.prompt_tokens, written.written_tokens, cut=written.cut)
        # of the key, the address or the model, unless it did answer with these
        may_be_the_chunk = self._answered or written.status not in (401, 403, 404)
        if may_be_the_chunk and isinstance(self._ask(PROBE), Completion):
            self._answered = True
            return Reply(written.said, fault=str(written))
        said = f": {written.said}" if written.said else ""
        raise UserError(f"endpoint.url {self._config.url} answers {written} for model {self._config.model!r}{said}")

    def _ask(self, prompt: str) -> Completion | EndpointError:
        """An answer, or an error that is final. Unanswered after the last try."""
        body = {"temperature": self._config.temperature, "max_tokens": self._config.max_tokens}
        try:
            return self._endpoint.submit(self._endpoint.complete(prompt, **body)).result()
        except EndpointError as error:
            if error.is_final:
                return error
            raise Unanswered(str(error), error.said) from None
