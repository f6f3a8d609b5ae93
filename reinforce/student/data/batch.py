"""The format of a batch, as the feed yields it and the student's task reads it.

It is a plain mapping, so loaders can pin, slice and move it without knowing its content. With B samples of a rank:

=================  ===========================  ==============================================================
``key``            list[str]                    sample keys
``image``          uint8 [B, size, size, 3]     one augmentation, replayed at the student's image size, RGB
``records``        list[CellRecord]             with the backend ``device-1``, whose cells then are in ``image``
``caption``        int64 [B, context]           tokens of the true caption (with ``mixed``: of the picked one)
``synthetic``      int64 [B, context]           tokens of a synthetic caption; absent with ``mixed`` or no captioner
``targets``        {teacher: {what: float32 [B, D]}}  unit-norm vectors of the teacher for ``image``, ``caption`` and
                   ..                           ``synthetic``; one-sided teachers have only their side
``views``          {teacher: uint8 [B, h, w, 3]}  the same augmentation at the recorded size; online teachers only
``texts``          {what: list[str]}            captions as text; online teachers only
=================  ===========================  ==============================================================
"""
