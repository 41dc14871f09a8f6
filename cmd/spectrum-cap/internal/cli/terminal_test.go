package cli_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/cmd/spectrum-cap/internal/cli"
)

// A screen is the far end of a terminal: what a person sees and types.
type screen struct {
	t    *testing.T
	file *os.File
	mu   sync.Mutex
	text strings.Builder
	done chan struct{}
}

// newTerminal opens a pseudo-terminal (pty(7)).
func newTerminal(t *testing.T) (*os.File, *screen) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("SKIPPED, this machine has no pseudo-terminals: %v", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &screen{t: t, file: os.NewFile(uintptr(fd), "ptmx"), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		buf := make([]byte, 4096)
		for {
			n, err := s.file.Read(buf)
			s.mu.Lock()
			s.text.Write(buf[:n])
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		tty.Close()
		<-s.done // the last end's closing ends the read
		s.file.Close()
	})
	return tty, s
}

func (s *screen) shows() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

func (s *screen) waitFor(text string) {
	s.t.Helper()
	for end := time.Now().Add(10 * time.Second); !strings.Contains(s.shows(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("no %q on the screen: %q", text, s.shows())
		}
	}
}

func onTerminal(t *testing.T, tty *os.File, socket string, env map[string]string, args ...string) (code chan int) {
	t.Helper()
	code = make(chan int, 1)
	go func() {
		code <- cli.Main(t.Context(), cli.Host{
			Args: append([]string{"--socket", socket}, args...), Stdin: tty, Stdout: tty, Stderr: tty,
			Getenv: func(k string) string { return env[k] },
		})
	}()
	return code
}

func TestConsoleOnTerminal(t *testing.T) {
	f := newFake()
	socket := serve(t, f)
	if code, _, errs := run(t, socket, "vm", "start", "work/mail"); code != 0 {
		t.Fatal(errs)
	}
	tty, s := newTerminal(t)
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	code := onTerminal(t, tty, socket, nil, "vm", "console", "work/mail")
	s.waitFor("connected, Ctrl-] leaves")
	s.waitFor("login: ")
	if _, err := s.file.WriteString("hi\n"); err != nil {
		t.Fatal(err)
	}
	s.waitFor("you said hi")
	if _, err := s.file.WriteString("\x1d"); err != nil {
		t.Fatal(err)
	}
	if got := <-code; got != 0 {
		t.Errorf("exit code %d: %q", got, s.shows())
	}
	after, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil || after.Lflag != before.Lflag || after.Iflag != before.Iflag || after.Oflag != before.Oflag {
		t.Errorf("the terminal is left changed: %+v, was %+v (%v)", after, before, err)
	}
}

// slowStart is a broker whose VMs take their time.
type slowStart struct{ *fake }

func (f slowStart) StartVM(ctx context.Context, by api.Caller, ref string) (api.VM, error) {
	time.Sleep(1500 * time.Millisecond)
	return f.fake.StartVM(ctx, by, ref)
}

func TestProgressAndColour(t *testing.T) {
	f := newFake()
	socket := serve(t, slowStart{f})
	tty, s := newTerminal(t)
	if code := <-onTerminal(t, tty, socket, nil, "vm", "start", "work/mail"); code != 0 {
		t.Fatal(s.shows())
	}
	s.waitFor("starting work/mail … 1 s")
	s.waitFor("work/mail is running")
	if code := <-onTerminal(t, tty, socket, nil, "vm", "list"); code != 0 {
		t.Fatal(s.shows())
	}
	s.waitFor("\x1b[32mrunning\x1b[0m")

	plainTTY, plain := newTerminal(t)
	if code := <-onTerminal(t, plainTTY, socket, map[string]string{"NO_COLOR": "1"}, "vm", "list"); code != 0 {
		t.Fatal(plain.shows())
	}
	plain.waitFor("builtin/net")
	if strings.Contains(plain.shows(), "\x1b") {
		t.Errorf("colour in spite of NO_COLOR: %q", plain.shows())
	}
}

// TestHostileText: a guest's words are printed, and drive no terminal.
func TestHostileText(t *testing.T) {
	f := newFake()
	f.vms[0].Problem = "\x1b]0;title\a\u009b2J\u202etxt\n\x00"
	socket := serve(t, f)
	for _, format := range []string{"table", "json", "yaml"} {
		for _, args := range [][]string{{"vm", "list"}, {"vm", "show", "work/mail"}} {
			code, out, errs := run(t, socket, append(args, "-o", format)...)
			if code != 0 || strings.ContainsAny(out, "\x1b\a\u009b\u202e\x00") {
				t.Errorf("%v as %s: code %d, %q, %q", args, format, code, out, errs)
			}
			if !strings.Contains(out, "title") {
				t.Errorf("%v as %s: the words are missing: %q", args, format, out)
			}
		}
	}
}
