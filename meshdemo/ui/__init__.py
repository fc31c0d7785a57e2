"""What people look at: tables and the live dashboard in the terminal, the web page in the browser."""
