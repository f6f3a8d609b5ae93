"""One batch of examples, as the stream yields it and the student's task reads it.

A plain mapping, so that loaders pin, slice and move it without knowing it. With B samples of a rank:

=================  ===========================  ==============================================================
``key``            list[str]                    sample keys
``image``          uint8 [B, size, size, 3]     one augmentation, replayed at the student's size, RGB
``caption``        int64 [B, context]           tokens of the true caption (with ``mixed``: of the drawn one)
``synthetic``      int64 [B, context]           tokens of one synthetic caption; absent with ``mixed`` or none
``targets``        {teacher: {what: float32 [B, D]}}  unit-norm vectors of the teacher for ``image``, ``caption`` and
                   ..                           ``synthetic``; one-sided teachers have that side's alone
``views``          {teacher: uint8 [B, h, w, 3]}  the same augmentation as a teacher sees it; online alone
``texts``          {what: list[str]}            captions as text, for teachers in the loop; online alone
=================  ===========================  ==============================================================
"""
