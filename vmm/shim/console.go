package shim

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of the console. The guest writes as much and as fast as it likes.
const (
	consoleChunk   = 4 << 10
	consoleBacklog = 64       // chunks that a slow reader may be behind
	consoleReplay  = 16 << 10 // what a new reader sees of the past
	consoleReaders = 16
)

// console is the VM's serial port: the shim reads it always, keeps the end of
// it in a file, and passes it to whoever is connected. The first of these that
// types is heard until it leaves; what others type is dropped.
type console struct {
	log      *slog.Logger
	listener *net.UnixListener

	mu      sync.Mutex
	file    *os.File
	written int64
	recent  []byte
	readers map[*consoleReader]bool
	typist  *consoleReader
	serial  *net.UnixConn
}

type consoleReader struct {
	conn   *net.UnixConn
	chunks chan []byte
}

func newConsole(log *slog.Logger) (*console, error) {
	_ = os.Remove(consoleName)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: consoleName})
	if err != nil {
		return nil, err
	}
	c := &console{log: log, listener: l, readers: map[*consoleReader]bool{}}
	c.file, err = openLog()
	return c, err
}

func openLog() (*os.File, error) {
	return os.OpenFile(consoleLog, os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
}

// follow reads one instance's serial port from the moment it appears.
func (c *console) follow(ctx context.Context, path string) {
	for ctx.Err() == nil {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
		if err == nil {
			c.read(ctx, conn)
		}
		select {
		case <-time.After(pollPause):
		case <-ctx.Done():
		}
	}
}

func (c *console) read(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	c.mu.Lock()
	c.serial = conn
	c.mu.Unlock()
	buf := make([]byte, consoleChunk)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			c.output(buf[:n])
		}
		if err != nil {
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.serial == conn {
		c.serial = nil
	}
}

// output never waits: a reader that is too far behind is disconnected.
func (c *console) output(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(b)
	c.recent = append(c.recent, b...)
	if over := len(c.recent) - consoleReplay; over > 0 {
		c.recent = append(c.recent[:0], c.recent[over:]...)
	}
	if len(c.readers) == 0 {
		return
	}
	chunk := append([]byte(nil), b...)
	for r := range c.readers {
		select {
		case r.chunks <- chunk:
		default:
			c.drop(r)
		}
	}
}

// keep writes the log, of which one older file is kept.
func (c *console) keep(b []byte) {
	if c.written += int64(len(b)); c.written > maxLog {
		_ = os.Rename(consoleLog, consoleLog+".1")
		if f, err := openLog(); err == nil {
			_ = c.file.Close()
			c.file, c.written = f, int64(len(b))
		}
	}
	_, _ = c.file.Write(b)
}

// serve accepts readers until ctx ends.
func (c *console) serve(ctx context.Context) {
	var conns sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = c.listener.Close() })
	defer stop()
	for {
		conn, err := c.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			time.Sleep(pollPause)
			continue
		}
		r := c.admit(conn)
		if r == nil {
			_ = conn.Close()
			continue
		}
		conns.Go(func() { r.write() })
		conns.Go(func() { c.input(r) })
	}
	c.mu.Lock()
	for r := range c.readers {
		c.drop(r)
	}
	c.mu.Unlock()
	conns.Wait()
	_ = c.file.Close()
}

// admit adds a reader and gives it the recent past.
func (c *console) admit(conn *net.UnixConn) *consoleReader {
	cred, err := peerCred(conn)
	if err != nil || cred.Uid != uint32(os.Geteuid()) && cred.Uid != 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.readers) >= consoleReaders {
		return nil
	}
	r := &consoleReader{conn: conn, chunks: make(chan []byte, consoleBacklog)}
	r.chunks <- append([]byte(nil), c.recent...)
	c.readers[r] = true
	return r
}

// drop disconnects a reader, under the mutex. What it was owed is lost.
func (c *console) drop(r *consoleReader) {
	if !c.readers[r] {
		return
	}
	delete(c.readers, r)
	if c.typist == r {
		c.typist = nil
	}
	close(r.chunks)
	_ = r.conn.SetDeadline(time.Now().Add(requestTime))
	_ = r.conn.CloseRead()
}

func (r *consoleReader) write() {
	defer r.conn.Close()
	for chunk := range r.chunks {
		if _, err := r.conn.Write(chunk); err != nil {
			return
		}
	}
}

// input passes on what a reader types, if it is its turn.
func (c *console) input(r *consoleReader) {
	buf := make([]byte, 256)
	for {
		n, err := r.conn.Read(buf)
		if err != nil {
			break
		}
		c.mu.Lock()
		if c.typist == nil && c.readers[r] {
			c.typist = r
		}
		serial := c.serial
		if c.typist != r {
			serial = nil
		}
		c.mu.Unlock()
		if serial != nil {
			_ = serial.SetWriteDeadline(time.Now().Add(tick))
			_, _ = serial.Write(buf[:n])
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(r)
}
