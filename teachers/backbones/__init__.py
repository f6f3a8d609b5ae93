"""Networks of images: models of timm, and those that classes and functions of users build."""
