"""What a captioning run leaves on disk: outcomes, resume, finish, report and export."""
