// Command generate writes the vector files into the current directory.
package main

import (
	"fmt"
	"os"

	"spectrum-os.org/broker/test/vectors"
)

func main() {
	files, err := vectors.Files()
	if err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
	for name, content := range files {
		if err := os.WriteFile(name, content, 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "generate:", err)
			os.Exit(1)
		}
	}
}
