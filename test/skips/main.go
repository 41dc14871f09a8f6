// Command skips runs "go test -json", or a test binary through test2json,
// prints what an ordinary run prints, and holds the run to the list of tests
// that may be skipped: under CI=true any other skip is a failure.
//
//	skips [-allow FILE] [-v] -- COMMAND [ARGUMENT…]
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	allow := flag.String("allow", "test/allowed-skips.txt", "tests that may be skipped: \"package test: reason\" a line")
	verbose := flag.Bool("v", false, "print the output of tests that pass, too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	status, err := run(ctx, *allow, *verbose, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "skips:", err)
		status = 2
	}
	os.Exit(status)
}

func run(ctx context.Context, allowFile string, verbose bool, argv []string) (int, error) {
	if len(argv) == 0 {
		return 0, errors.New("no command")
	}
	f, err := os.Open(allowFile)
	if err != nil {
		return 0, err
	}
	allowed, err := parseAllowed(f)
	_ = f.Close()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", allowFile, err)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	r := &report{out: os.Stdout, verbose: verbose, output: map[testID][]string{}}
	readErr := r.read(out)
	waitErr := cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](waitErr); ok {
		return max(exit.ExitCode(), 1), readErr
	}
	if err := errors.Join(readErr, waitErr); err != nil {
		return 0, err
	}
	if r.failed {
		return 1, nil
	}
	return judge(os.Stdout, r.skipped, allowed, os.Getenv("CI") == "true"), nil
}

type testID struct{ pkg, test string }

// skip is one test that did not run, and why.
type skip struct {
	testID
	why string
}

// parseAllowed reads "package test: reason" lines. A reason is required.
func parseAllowed(r io.Reader) (map[testID]string, error) {
	allowed := map[testID]string{}
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, reason, ok := strings.Cut(line, ": ")
		fields := strings.Fields(name)
		if !ok || len(fields) != 2 || strings.TrimSpace(reason) == "" {
			return nil, fmt.Errorf("line %d is not \"package test: reason\"", n)
		}
		allowed[testID{fields[0], fields[1]}] = strings.TrimSpace(reason)
	}
	return allowed, lines.Err()
}

// judge prints the skips and returns the exit status they deserve.
func judge(w io.Writer, skipped []skip, allowed map[testID]string, strict bool) int {
	status := 0
	for _, s := range skipped {
		if reason, ok := allowed[s.testID]; ok {
			fmt.Fprintf(w, "skipped, as allowed: %s %s: %s\n", s.pkg, s.test, reason)
			continue
		}
		fmt.Fprintf(w, "SKIPPED: %s %s: %s\n", s.pkg, s.test, s.why)
		if strict {
			status = 1
		}
	}
	if status != 0 {
		fmt.Fprintln(w, "FAIL: with CI=true these tests must run, or stand in test/allowed-skips.txt")
	}
	return status
}

// event is a line of "go test -json", see "go doc test2json".
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

// report turns events back into text.
type report struct {
	out     io.Writer
	verbose bool
	output  map[testID][]string
	skipped []skip
	failed  bool
	said    bool // the package printed its own result line
}

func (r *report) read(events io.Reader) error {
	lines := bufio.NewReader(events)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil {
				// Not an event: the build's own words.
				fmt.Fprint(r.out, string(line))
			} else {
				r.note(e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *report) note(e event) {
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "output", "build-output":
		r.text(id, e.Output)
	case "pass", "fail", "skip":
		r.end(id, e)
	}
}

func (r *report) text(id testID, line string) {
	frame := strings.HasPrefix(line, "=== ")
	switch {
	case id.test == "":
		if strings.HasPrefix(line, "ok  \t") || strings.HasPrefix(line, "FAIL\t") || strings.HasPrefix(line, "?   \t") {
			r.said = true
		}
		if line != "PASS\n" && !strings.HasPrefix(line, "?   \t") {
			fmt.Fprint(r.out, line)
		}
	case r.verbose && !frame:
		fmt.Fprint(r.out, line)
		fallthrough
	default:
		if !frame {
			r.output[id] = append(r.output[id], line)
		}
	}
}

func (r *report) end(id testID, e event) {
	if id.test == "" {
		if !r.said && e.Action != "skip" {
			word := map[string]string{"pass": "ok  ", "fail": "FAIL"}[e.Action]
			fmt.Fprintf(r.out, "%s\t%s\t%.3fs\n", word, id.pkg, e.Elapsed)
		}
		r.said = false
		r.failed = r.failed || e.Action == "fail"
		return
	}
	text := r.output[id]
	delete(r.output, id)
	switch e.Action {
	case "skip":
		r.skipped = append(r.skipped, skip{id, reason(text)})
	case "fail":
		r.failed = true
		if !r.verbose {
			fmt.Fprint(r.out, strings.Join(text, ""))
		}
	}
}

// reason is what a skipped test said last before its result line.
func reason(text []string) string {
	why := "no reason given"
	for _, line := range text {
		if !strings.HasPrefix(strings.TrimSpace(line), "--- SKIP") {
			why = strings.TrimSpace(line)
		}
	}
	return why
}
