// Program hit takes three steps, twice each, and prints each one that it
// survives.
package main

import (
	"fmt"
	"time"

	"spectrum-os.org/broker/failpoint"
)

func main() {
	for range 2 {
		start := time.Now()
		failpoint.Hit("test.one")
		fmt.Println("one", time.Since(start) >= 100*time.Millisecond)
		failpoint.Hit("test.two")
		fmt.Println("two")
	}
}
