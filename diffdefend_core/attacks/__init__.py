"""Attacks: published backdoors in their common form, for red-team models. Nothing that scans imports them.

`form` holds the form (a shift s_t of the input and a response rho_t of the network) and the poisoned training loss;
every other module is one attack, as the pair (s_t, rho_t).
"""
