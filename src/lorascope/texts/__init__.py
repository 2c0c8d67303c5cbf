"""Texts under study: records, chat templates, rollouts and tokens. Needs no torch."""
