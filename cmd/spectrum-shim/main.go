// Command spectrum-shim runs one VM for spectrum-broker.
package main

import (
	"os"

	"spectrum-os.org/broker/vmm/shim"
)

func main() { os.Exit(shim.Main()) }
