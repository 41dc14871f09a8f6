package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const micro = float64(time.Microsecond)

// cpu is the CPU time that this process has used, all threads.
func cpu() time.Duration {
	var ru unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &ru)
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

func wall() time.Duration { return time.Duration(time.Now().UnixNano()) }

// best runs two things in turn, rounds times n, and returns the least time
// of one of each in nanoseconds, by the given clock.
func best(clock func() time.Duration, rounds, n int, a, probe func() error) (ofA, ofProbe float64, err error) {
	time1 := func(f func() error) (float64, error) {
		began := clock()
		for range n {
			if err := f(); err != nil {
				return 0, err
			}
		}
		return float64(clock()-began) / float64(n), nil
	}
	for i := range rounds {
		x, err := time1(a)
		if err != nil {
			return 0, 0, err
		}
		y, err := time1(probe)
		if err != nil {
			return 0, 0, err
		}
		if i == 0 {
			ofA, ofProbe = x, y
		}
		ofA, ofProbe = min(ofA, x), min(ofProbe, y)
	}
	return ofA, ofProbe, nil
}

// rest is a pause after which a machine has to wake up again.
const rest = 2 * time.Millisecond

// rested runs things in turn, n times, each after a rest, and returns the median
// of each in nanoseconds. What is done now and then, as a person's request is,
// finds cold caches and a processor that sleeps.
func rested(n int, things ...func() error) ([]float64, error) {
	times := make([][]float64, len(things))
	for range n {
		for i, f := range things {
			time.Sleep(rest)
			began := wall()
			if err := f(); err != nil {
				return nil, err
			}
			times[i] = append(times[i], float64(wall()-began))
		}
	}
	out := make([]float64, len(things))
	for i, t := range times {
		slices.Sort(t)
		out[i] = t[len(t)/2]
	}
	return out, nil
}

// appender is the probe of a durable commit: append and fdatasync.
type appender struct{ f *os.File }

func newAppender(dir string) (*appender, error) {
	f, err := os.CreateTemp(dir, "probe-*")
	return &appender{f}, err
}

// once appends about as many bytes as an event has.
func (a *appender) once() error { return a.append(256) }

// page appends what SQLite writes for an event: a page and its header.
func (a *appender) page() error { return a.append(4096 + 24) }

func (a *appender) append(n int) error {
	if _, err := a.f.Write(make([]byte, n)); err != nil {
		return err
	}
	return unix.Fdatasync(int(a.f.Fd()))
}

func (a *appender) close() { _ = a.f.Close() }

// cpuOf is the CPU time that another process has used so far, all threads that
// live.
func cpuOf(pid int) (time.Duration, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(files) == 0 {
		return 0, fmt.Errorf("cannot read the CPU time of process %d: %w", pid, errors.Join(err, os.ErrNotExist))
	}
	sum := time.Duration(0)
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			return 0, err
		}
		first, _, _ := strings.Cut(string(raw), " ")
		ns, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", f, err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

var fieldPattern = regexp.MustCompile(`(?m)^(\w+):\s+(\d+) kB`)

// memory reads fields of /proc/PID/smaps_rollup, in MB.
func memory(pid int, fields ...string) (float64, error) {
	return kilobytes(fmt.Sprintf("/proc/%d/smaps_rollup", pid), fields...)
}

// kilobytes is the sum of fields of a file of /proc, in MB.
func kilobytes(path string, fields ...string) (float64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	sum := 0.0
	for _, m := range fieldPattern.FindAllSubmatch(raw, -1) {
		for _, f := range fields {
			if bytes.Equal(m[1], []byte(f)) {
				kb, _ := strconv.ParseFloat(string(m[2]), 64)
				sum += kb / 1000
			}
		}
	}
	return sum, nil
}
