from fusedgpt.train.cli.main import main

main()
