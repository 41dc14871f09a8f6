package shim

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"spectrum-os.org/broker/failpoint"
)

// Bounds of the shim's own socket. The peer is the broker, or somebody with
// its rights; the bounds keep its mistakes small.
const (
	maxConns    = 1024
	requestTime = 10 * time.Second
)

// listenConns serves the socket until ctx ends. Each connection has one
// request at a time, and none waits for another's.
func (s *server) listenConns(ctx context.Context, l *net.UnixListener) {
	var conns sync.WaitGroup
	defer conns.Wait()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	room := make(chan struct{}, maxConns)
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(pollPause)
			continue
		}
		if !s.mayTalk(conn) {
			_ = conn.Close()
			continue
		}
		select {
		case room <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		conns.Go(func() {
			defer func() { <-room }()
			s.talk(ctx, conn)
		})
	}
}

func (s *server) mayTalk(conn *net.UnixConn) bool {
	cred, err := peerCred(conn)
	if err == nil && (cred.Uid == uint32(os.Geteuid()) || cred.Uid == 0) {
		return true
	}
	s.log.Warn("a stranger connected", "cred", cred, "error", err)
	return false
}

// talk serves one connection until its peer closes it.
func (s *server) talk(ctx context.Context, conn *net.UnixConn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		packet, f, err := recvPacket(conn, maxRequest)
		if err != nil {
			return
		}
		rep := s.answer(ctx, packet, f)
		failpoint.Hit("shim.reply.before")
		_ = conn.SetWriteDeadline(time.Now().Add(requestTime))
		if err := sendPacket(conn, rep, maxReply); err != nil {
			s.log.Warn("cannot reply", "error", err)
			return
		}
		failpoint.Hit("shim.reply.after")
		if rep.State != nil && rep.State.Phase == Stopped {
			s.toldOnce.Do(func() { close(s.toldEnd) })
		}
	}
}

// answer carries out one request. f, where there is one, is used up.
func (s *server) answer(ctx context.Context, packet []byte, f *os.File) *reply {
	r, err := decodeRequest(packet)
	if err == nil && (f != nil) != (r.Op == opPut) {
		err = refuse(CodeBadRequest, "a descriptor belongs to a put and only there")
	}
	if err != nil {
		if f != nil {
			_ = f.Close()
		}
		var refused *Error
		if !errors.As(err, &refused) {
			refused = refuse(CodeBadRequest, "%v", err)
		}
		return &reply{Error: refused}
	}
	switch r.Op {
	case opPut:
		st, err := s.put(ctx, r.Object, f)
		return objectReply(st, err)
	case opRemove:
		st, err := s.remove(ctx, r.ID, r.Generation)
		return objectReply(st, err)
	case opExtend:
		st, err := s.extend(r)
		return objectReply(st, err)
	case opWatch:
		return stateReply(s.watch(ctx, r.Seen))
	case opStop:
		s.stop(time.Duration(r.GraceMS) * time.Millisecond)
		select {
		case <-s.finished:
		case <-ctx.Done():
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return stateReply(s.state())
}

func stateReply(st State) *reply { return &reply{State: &st} }

func objectReply(st ObjectState, err *Error) *reply {
	if err != nil {
		return &reply{Error: err}
	}
	return &reply{Object: &st}
}
