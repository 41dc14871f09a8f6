package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// ErrNoListener says that the guest runs, but nothing in it accepted the
// connection.
var ErrNoListener = errors.New("nothing in the guest listens on that port")

// DialHybrid connects to port of the guest whose hybrid-vsock socket is at
// path: CONNECT <port>, answered OK <n>, as Cloud Hypervisor and Firecracker
// do it. ctx bounds the handshake only.
func DialHybrid(ctx context.Context, path string, port uint32) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the guest's vsock: %w", err)
	}
	if err := handshake(ctx, conn, port); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("cannot reach vsock port %d: %w", port, err)
	}
	return conn, nil
}

func handshake(ctx context.Context, conn net.Conn, port uint32) error {
	stop := closeWith(ctx, conn)
	defer stop()
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return becauseOf(ctx, ErrNoListener)
	}
	line, err := readLine(conn)
	if err != nil {
		return becauseOf(ctx, err)
	}
	n, ok := strings.CutPrefix(line, "OK ")
	if !ok {
		return fmt.Errorf("vsock answered %q", Printable(line, 32))
	}
	if _, err := strconv.ParseUint(n, 10, 32); err != nil {
		return fmt.Errorf("vsock answered %q", Printable(line, 32))
	}
	if !stop() {
		return ctx.Err()
	}
	return conn.SetDeadline(time.Time{})
}

// readLine reads byte by byte: what follows the line belongs to the caller.
func readLine(conn net.Conn) (string, error) {
	var line []byte
	for one := make([]byte, 1); len(line) < 32; {
		if _, err := conn.Read(one); err != nil {
			return "", ErrNoListener
		}
		if one[0] == '\n' {
			return string(line), nil
		}
		line = append(line, one[0])
	}
	return "", errors.New("vsock's answer has no end")
}

// closeWith ends conn's pending operations when ctx does. The returned stop
// reports whether it came in time.
func closeWith(ctx context.Context, conn net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
}

func becauseOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
