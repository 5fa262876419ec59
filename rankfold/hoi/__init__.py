"""Zero-shot detection of human-object interactions with decomposed text features: HOLa [arXiv 2507.15542].

An interaction is a (verb, object) pair, such as "riding a bicycle". The text features of all interactions are
one matrix T (interactions, features), decomposed as W·B: the weights W learn from seen interactions, and
unseen ones share the basis B. Data, model, losses, training, evaluation and pictures are all here; a detector
and a vision-language model come from transformers.
"""
