"""Text and token sequences: real corpora (`corpus`), synthetic retrieval (`synthetic`), training batches (`curriculum`)."""
