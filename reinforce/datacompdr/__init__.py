"""Published reinforcements (DataCompDR, DFNDR): members, values, and their match with samples."""
