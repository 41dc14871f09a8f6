// Package clock reads the machine's clocks.
//
// Its laws: nothing else in the module reads a clock that a lease depends on,
// and a program has one Clock, which its wiring hands to whoever needs the
// time. An Instant carries the boot it was read in, so that readings of two
// boots are never compared.
package clock

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/capabilities"
)

// Clock tells the time.
type Clock interface {
	Now() capabilities.Instant
}

const bootIDFile = "/proc/sys/kernel/random/boot_id"

// bootID cannot change while a process lives.
var bootID = sync.OnceValues(func() (string, error) {
	raw, err := os.ReadFile(bootIDFile)
	if err != nil {
		return "", fmt.Errorf("cannot tell which boot this is: %w", err)
	}
	id, err := uuid.Parse(strings.TrimSpace(string(raw)))
	if err != nil {
		return "", fmt.Errorf("cannot tell which boot this is: %s: %w", bootIDFile, err)
	}
	return id.String(), nil
})

// BootID names this boot of the machine. A program that keeps leases asks once
// at its start and ends on an error, since System would then know wall time
// only.
func BootID() (string, error) { return bootID() }

// System is the machine's own clock.
type System struct{}

// Now reads CLOCK_REALTIME and CLOCK_BOOTTIME. Where the boot id cannot be
// read it is empty, and the instant's wall time alone counts.
func (System) Now() capabilities.Instant {
	id, err := bootID()
	if err != nil {
		id = ""
	}
	return capabilities.Instant{
		// The same clock as time.Now's, which asks it without a system call;
		// Round takes off the monotonic reading.
		Wall:   time.Now().UTC().Round(0),
		BootID: id,
		Boot:   boottime(),
	}
}

// boottime cannot fail: every supported kernel has the clock.
func boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(fmt.Sprintf("clock: clock_gettime(CLOCK_BOOTTIME): %v", err))
	}
	return time.Duration(ts.Nano())
}
