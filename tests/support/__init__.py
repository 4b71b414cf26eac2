"""What tests share: models, servers, and programs that tests start as processes of their own."""
