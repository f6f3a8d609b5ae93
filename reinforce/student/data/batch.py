"""The format of a batch, as the feed yields it and the student's task reads it.

It is a plain mapping, so loaders can pin, slice and move it without knowing its content. With B samples of a rank:

=================  ===========================  ==============================================================
``key``            list[str]                    sample keys
``image``          uint8 [B, size, size, 3]     one augmentation, replayed at the student's image size, RGB;
                   ..                           absent with ``images: none``
``records``        list[CellRecord]             with the backend ``device-1``, whose cells then are in ``image``
``caption``        int64 [B, context]           tokens of the true caption (with ``mixed``: of the picked one)
``synthetic``      int64 [B, context]           tokens of a synthetic caption; absent with ``mixed`` or no captioner
``targets``        {model: {name: [B, ...]}}    what is stored of each model: of a teacher, unit-norm vectors float32
                   ..                           [B, D] of ``image``, ``caption`` and ``synthetic``, as far as it has
                   ..                           them; see ``target_tensors`` of a kind of layers
``crops``          {teacher: uint8 [B, h, w, 3]}  the same augmentation at the recorded size; online teachers only
``texts``          {what: list[str]}            captions as text; online teachers only
=================  ===========================  ==============================================================
"""
