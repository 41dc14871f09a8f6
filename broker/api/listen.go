package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// ErrSocketInUse says that something answers on the socket already.
var ErrSocketInUse = errors.New("another process listens on this socket")

// maxSocketPath is what fits into sockaddr_un with its final NUL (unix(7)).
const maxSocketPath = 107

// ListenHost listens on a UNIX socket at path, whose directory must exist.
// The socket appears there complete: with its mode, with its group if group
// (a name or number) is not empty, and already listening. A socket that a
// dead process left is replaced; a live one is ErrSocketInUse; anything that
// is not a socket is left alone and refused. Closing removes the socket.
func ListenHost(path string, mode fs.FileMode, group string) (net.Listener, error) {
	gid := -1
	if group != "" {
		var err error
		if gid, err = lookupGroup(group); err != nil {
			return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
		}
	}
	return listen(path, mode, gid)
}

// ListenGuest is ListenHost for a VM's socket, which nobody but the broker's
// user may open.
func ListenGuest(path string) (net.Listener, error) {
	l, err := listen(path, 0o600, -1)
	if err != nil {
		return nil, err
	}
	if err := shortenQueue(l.(*socketListener)); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot listen on %s: %w", path, err), l.Close())
	}
	return l, nil
}

// guestQueue is how many connections of a guest may wait to be accepted: with
// the pace of boundedListener, no honest one waits long behind a storm.
const guestQueue = 128

func shortenQueue(l *socketListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.Listen(int(fd), guestQueue) })
	return errors.Join(err, failed)
}

func lookupGroup(group string) (int, error) {
	if gid, err := strconv.ParseUint(group, 10, 31); err == nil {
		return int(gid), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(g.Gid)
}

func listen(path string, mode fs.FileMode, gid int) (_ net.Listener, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot listen on %s: %w", path, err)
		}
	}()
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("the path is longer than %d bytes", maxSocketPath)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	// Two starting brokers must not both find the old socket dead. The lock
	// goes with the descriptor.
	if err := lockDir(dir); err != nil {
		return nil, err
	}
	if err := checkVacant(path); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(path), ".listen-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	private, err := os.Open(tmp)
	if err != nil {
		return nil, err
	}
	defer func() { _ = private.Close() }()
	// Bound inside a 0700 directory, nobody can reach it before it has its
	// mode; named through the descriptor, its path is always short enough.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/s", private.Fd())})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	inner := filepath.Join(tmp, "s")
	if err = os.Chown(inner, -1, gid); err == nil {
		err = os.Chmod(inner, mode.Perm())
	}
	var info os.FileInfo
	if err == nil {
		info, err = os.Lstat(inner)
	}
	if err == nil {
		err = os.Rename(inner, path)
	}
	if err != nil {
		_ = l.Close()
		return nil, err
	}
	return &socketListener{UnixListener: l, path: path, info: info}, nil
}

func lockDir(dir *os.File) error {
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return err
		}
	}
}

// checkVacant says whether path may be taken.
func checkVacant(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("something that is not a socket is there")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		_ = conn.Close()
		return ErrSocketInUse
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil
	}
	// Busy, forbidden: alive as far as we can tell.
	return fmt.Errorf("%w: %w", ErrSocketInUse, err)
}

// socketListener removes its socket on Close unless another has taken its
// place.
type socketListener struct {
	*net.UnixListener
	path string
	info os.FileInfo
	once sync.Once
}

func (l *socketListener) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: l.path} }

func (l *socketListener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		if now, statErr := os.Lstat(l.path); statErr == nil && os.SameFile(now, l.info) {
			_ = os.Remove(l.path)
		}
	})
	return err
}

// boundedListener accepts at most max connections at once and not too many a
// second. One over the bound is told so and closed.
type boundedListener struct {
	net.Listener
	ctx   context.Context
	slots chan struct{}
	pace  *rate.Limiter
}

func newBoundedListener(ctx context.Context, l net.Listener, conns int) *boundedListener {
	return &boundedListener{
		Listener: l, ctx: ctx, slots: make(chan struct{}, conns),
		pace: rate.NewLimiter(400, 4*conns),
	}
}

func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		// The wait holds up only this VM; its kernel's queue fills.
		_ = l.pace.Wait(l.ctx)
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &boundedConn{Conn: conn, free: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
		}
		a := answerProblem(guestProblemOf(&Error{Code: CodeRateLimited, RetryAfter: 1}, CodeNotFound))
		_ = conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 429 Too Many Requests\r\nContent-Type: %s\r\nContent-Length: %d\r\nRetry-After: 1\r\nConnection: close\r\n\r\n%s",
			a.contentType, len(a.body), a.body)
		_ = conn.Close()
	}
}

type boundedConn struct {
	net.Conn
	free func()
}

func (c *boundedConn) Close() error {
	err := c.Conn.Close()
	c.free()
	return err
}
