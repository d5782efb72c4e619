from detent.cli import main

main()
