"""``python -m kvpolicy_adapters.evaluation.lm_eval run --model kvpolicy ...``: lm_eval itself.

The harness has no door by which other packages' models come in, so that the model is registered
here, before its command line is called.
"""

from lm_eval.__main__ import cli_evaluate

import kvpolicy_adapters.evaluation.lm_eval.model  # noqa: F401 - registers the model

if __name__ == "__main__":
    cli_evaluate()
