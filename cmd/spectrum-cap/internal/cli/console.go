package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// consoleEscape is Ctrl-], as telnet and virsh have it.
const consoleEscape = 0x1d

func (a *app) vmConsoleCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "console VM",
		Short: "Connect the terminal to a VM's serial console",
		Long: `Connect the terminal to a VM's serial console. Ctrl-] leaves it.

What the guest writes reaches the terminal as it is, control sequences too. The
command ends when the VM does. Without a terminal, stdin goes to the guest, and
its output to stdout.`,
		Example: `  spectrum-cap vm console work/mail
  spectrum-cap vm console work/mail </dev/null >boot.log`,
		Args:              args(1, 1, "a VM"),
		ValidArgsFunction: a.completeVM,
		RunE: func(cmd *cobra.Command, got []string) error {
			if a.output != "table" {
				return usage("a console has no -o %s", a.output)
			}
			conn, err := a.broker().Console(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			defer conn.Close()
			return a.attach(cmd.Context(), conn)
		},
	}
}

// attach joins the terminal to conn until either ends. The goroutine that
// reads stdin may stay in its read: only the program's end ends that.
func (a *app) attach(ctx context.Context, conn net.Conn) error {
	fd, tty := terminal(a.host.Stdin)
	if tty {
		old, err := term.MakeRaw(fd)
		if err != nil {
			return fmt.Errorf("cannot prepare the terminal: %w", err)
		}
		defer func() { _ = term.Restore(fd, old) }()
		a.noteRaw("connected, Ctrl-] leaves")
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	left := make(chan error, 2)
	go func() {
		_, err := io.Copy(a.host.Stdout, conn)
		if err == nil {
			err = io.EOF
		}
		left <- err
	}()
	go func() {
		if typeTo(conn, a.host.Stdin, tty) {
			left <- errLeft
		}
	}()
	switch err := <-left; {
	case errors.Is(err, errLeft):
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, io.EOF):
		if tty {
			a.noteRaw("the console is closed")
		}
	default:
		return fmt.Errorf("the console broke off: %w", err)
	}
	return nil
}

// noteRaw is a note on a terminal in raw mode.
func (a *app) noteRaw(text string) {
	_, _ = fmt.Fprint(a.host.Stderr, "\r\nspectrum-cap: "+text+"\r\n")
}

var errLeft = errors.New("left the console")

// typeTo copies what is typed until no more comes or the other end takes none,
// which the reader of its output learns too. It tells whether the person left.
func typeTo(conn io.Writer, stdin io.Reader, escape bool) (left bool) {
	buf := make([]byte, 4096)
	for {
		n, err := stdin.Read(buf)
		b := buf[:n]
		if i := bytes.IndexByte(b, consoleEscape); escape && i >= 0 {
			_, _ = conn.Write(b[:i])
			return true
		}
		if _, werr := conn.Write(b); werr != nil || err != nil {
			return false
		}
	}
}
