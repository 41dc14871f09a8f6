package api

import (
	"context"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

type callerKey struct{}

// WithCaller returns a context that says who calls.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerFrom returns the caller of a context, and whether it has one.
func CallerFrom(ctx context.Context) (Caller, bool) {
	c, ok := ctx.Value(callerKey{}).(Caller)
	return c, ok
}

// PeerCred returns the process at the other end of a UNIX stream connection
// as the kernel recorded it when the connection was made (SO_PEERCRED,
// unix(7)).
func PeerCred(conn net.Conn) (Caller, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return Caller{}, fmt.Errorf("cannot read peer credentials of a %T", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return Caller{}, fmt.Errorf("cannot read peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var sockErr error
	if err := raw.Control(func(fd uintptr) {
		cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Caller{}, fmt.Errorf("cannot read peer credentials: %w", err)
	}
	if sockErr != nil {
		return Caller{}, fmt.Errorf("cannot read peer credentials: %w", sockErr)
	}
	return Caller{Kind: CallerPerson, UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}
