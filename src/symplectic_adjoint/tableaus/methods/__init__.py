"""One function for each method, named as the method; every module lists its methods in ``__all__``.

``F(p, q)`` is the exact rational number; tuples are rows of the published tableaus. The node of a
method that was published as FSAL is left out (see :class:`symplectic_adjoint.tableaus.Tableau`).
"""
