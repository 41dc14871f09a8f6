// Command demo shows a capability on a real guest: granted because a Rego
// policy said so, used, and taken back while it is used. Everything that it
// announces is checked; any difference is a non-zero exit.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"spectrum-os.org/broker/test/harness"
)

func main() {
	var tools harness.Tools
	tools.Register(flag.CommandLine)
	keep := flag.Bool("keep", false, "leave it running and say how to use it")
	flag.Parse()
	if err := tools.Missing(); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	told, cleaned := show(ctx, tools, *keep)
	switch {
	case cleaned != nil:
		fmt.Fprintln(os.Stderr, "\ndemo: FAILED to clean up:", errors.Join(told, cleaned))
		os.Exit(1)
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "\ndemo: interrupted; everything it made is gone")
		os.Exit(130)
	case told != nil:
		fmt.Fprintln(os.Stderr, "\ndemo: FAILED:", told)
		os.Exit(1)
	}
}

// show makes a desktop, runs the story on it, and takes it away again.
func show(ctx context.Context, tools harness.Tools, keep bool) (told, cleaned error) {
	dir, err := os.MkdirTemp("", "spectrum-demo-")
	if err != nil {
		return err, nil
	}
	desktop, err := harness.New(tools, dir)
	if err != nil {
		return err, os.RemoveAll(dir)
	}
	s := &story{ctx: ctx, d: desktop, out: os.Stdout}
	told = s.tell()
	if keep && told == nil && ctx.Err() == nil {
		s.sayHowToUse()
		return nil, nil
	}
	return told, s.clean(told != nil && ctx.Err() == nil)
}

// story is the demo under way.
type story struct {
	ctx   context.Context //nolint:containedctx // the program's one
	d     *harness.Desktop
	out   io.Writer
	steps int
}

// step runs one step and prints what it shows and how long it took. check
// returns what was seen.
func (s *story) step(title string, check func() (string, error)) error {
	s.steps++
	fmt.Fprintf(s.out, "%2d. %s\n", s.steps, title)
	began := time.Now()
	seen, err := check()
	took := time.Since(began)
	if err != nil {
		return fmt.Errorf("step %d, %s: %w", s.steps, title, err)
	}
	for line := range strings.Lines(strings.TrimSpace(seen)) {
		fmt.Fprintf(s.out, "      %s\n", strings.TrimRight(line, "\n"))
	}
	fmt.Fprintf(s.out, "    ✓ %v\n", took.Round(time.Millisecond))
	return s.ctx.Err()
}

// cli runs spectrum-cap as a person would and returns what it printed.
func (s *story) cli(wantExit int, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.d.Stretched(2*time.Minute))
	defer cancel()
	cmd := exec.CommandContext(ctx, s.d.Tools.Cap, args...)
	cmd.Env = append(os.Environ(), "SPECTRUM_BROKER_SOCKET="+s.d.Socket(), "NO_COLOR=1")
	// Ctrl-C is this program's to handle, in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", err
	}
	shown := "$ spectrum-cap " + strings.Join(args, " ") + "\n" + strings.TrimSpace(out.String())
	if got := cmd.ProcessState.ExitCode(); got != wantExit {
		return "", fmt.Errorf("exit %d where %d was expected:\n%s", got, wantExit, shown)
	}
	return shown, nil
}

// mustSay fails unless text holds every one of parts.
func mustSay(text string, parts ...string) error {
	for _, p := range parts {
		if !strings.Contains(text, p) {
			return fmt.Errorf("%q is missing in:\n%s", p, text)
		}
	}
	return nil
}

func (s *story) clean(failed bool) error {
	if failed {
		if log, err := os.ReadFile(filepath.Join(s.d.Dir, "broker.log")); err == nil {
			fmt.Fprintf(os.Stderr, "\nthe broker's log:\n%s", log)
		}
	}
	err := s.d.Close()
	if left := s.d.Leftovers(s.d.Stretched(10 * time.Second)); len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind:\n  %s", strings.Join(left, "\n  ")))
	}
	return errors.Join(err, os.RemoveAll(s.d.Dir))
}

func (s *story) sayHowToUse() {
	fmt.Fprintf(s.out, `
It is still running. Use it with:
  export SPECTRUM_BROKER_SOCKET=%s PATH=%s:$PATH
  spectrum-cap vm list
Its files are in %s. To end it and remove everything:
  spectrum-cap revoke --all; spectrum-cap vm stop work/reader; spectrum-cap vm stop home/viewer; kill %d; rm -r %s
`, s.d.Socket(), filepath.Dir(s.d.Tools.Cap), s.d.Dir, s.d.BrokerPID(), s.d.Dir)
}
