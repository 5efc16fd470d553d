"""transformers' loader for each of PEFT's task types."""

from __future__ import annotations

from collections.abc import Mapping

#: Names of classes of transformers, which is not imported here.
LOADERS: Mapping[str, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
