"""What a failure means. Pure: no Ray, no storage, no clock."""
