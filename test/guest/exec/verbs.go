package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

func dialHost(port string) (*vsock.Conn, error) {
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return nil, err
	}
	return vsock.Dial(unix.VMADDR_CID_HOST, uint32(n), nil)
}

func vsockPipe(args []string) error {
	conn, err := dialHost(args[0])
	if err != nil {
		return err
	}
	defer conn.Close()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.Copy(conn, os.Stdin)
	}()
	_, err = io.Copy(os.Stdout, conn)
	<-sent
	return err
}

func vsockFlood(args []string) error {
	count, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	seconds, err := strconv.ParseFloat(args[2], 64)
	if err != nil {
		return err
	}
	end := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	rubbish := bytes.Repeat([]byte("GET / HTTP/1.1\r\nx: "), 4096)
	var all sync.WaitGroup
	for range count {
		all.Go(func() {
			for time.Now().Before(end) {
				conn, err := dialHost(args[0])
				if err != nil {
					time.Sleep(10 * time.Millisecond)
					continue
				}
				_ = conn.SetDeadline(end)
				for err == nil {
					_, err = conn.Write(rubbish)
				}
				_ = conn.Close()
			}
		})
	}
	all.Wait()
	return nil
}

func vsockListen(args []string) error {
	port, err := strconv.ParseUint(args[0], 10, 32)
	if err != nil {
		return err
	}
	say, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, uint32(port), nil)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			_, _ = conn.Write(say)
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}()
	}
}

// vsockLiar is an agent that looks healthy and never finishes anything.
func vsockLiar(args []string) error {
	port, err := strconv.ParseUint(args[0], 10, 32)
	if err != nil {
		return err
	}
	health, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	var answer []byte
	if args[1] != "-" {
		if answer, err = os.ReadFile(args[1]); err != nil {
			return err
		}
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, uint32(port), nil)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			request := make([]byte, 4096)
			n, _ := conn.Read(request)
			if bytes.HasPrefix(request[:n], []byte("GET /v1/health ")) {
				_, _ = conn.Write(health)
				return
			}
			if answer != nil {
				_, _ = conn.Write(answer)
				_, _ = io.Copy(io.Discard, conn)
				return
			}
			_, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\nx: ")
			for err == nil {
				time.Sleep(200 * time.Millisecond)
				_, err = conn.Write([]byte("a"))
			}
		}()
	}
}

func vsockStorm(args []string) error {
	attempts, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	var in, next atomic.Int64
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() {
			for next.Add(1) <= int64(attempts) {
				if conn, err := dialHost(args[0]); err == nil {
					in.Add(1)
					_ = conn.Close()
				}
			}
		})
	}
	all.Wait()
	fmt.Println(in.Load(), "of", attempts)
	return nil
}

// swap exchanges DIR/ENTRY, a directory, with a symlink to TARGET, COUNT
// times or, with COUNT 0, until it is killed, each by one atomic rename.
func swap(args []string) error {
	dir, entry, target := args[0], args[1], args[2]
	count, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	link, real := filepath.Join(dir, ".swap-link"), filepath.Join(dir, entry)
	if err := os.Symlink(target, link); err != nil {
		return err
	}
	fmt.Println("swapping")
	for i := 1; count == 0 || i <= count; i++ {
		if err := unix.Renameat2(unix.AT_FDCWD, link, unix.AT_FDCWD, real, unix.RENAME_EXCHANGE); err != nil {
			return fmt.Errorf("swap %d: %w", i, err)
		}
		if i%1000 == 0 {
			fmt.Println(i)
		}
	}
	return nil
}

func readLoop(args []string) error {
	buf := make([]byte, 1<<20)
	for round := 0; ; round++ {
		f, err := os.Open(args[0])
		if err != nil {
			return fmt.Errorf("%w: %w", errIO, err)
		}
		for err == nil {
			_, err = f.Read(buf)
		}
		if !errors.Is(err, io.EOF) {
			return fmt.Errorf("%w: %w", errIO, err)
		}
		// So that the next round asks the host again.
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		_ = f.Close()
		if round == 0 {
			fmt.Println("reading")
		}
	}
}

func writeLoop(args []string) error {
	buf := bytes.Repeat([]byte("spectrum"), 1<<13)
	for round := 0; ; round++ {
		f, err := os.OpenFile(args[0], os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
		for n := 0; err == nil && n < 16; n++ {
			_, err = f.Write(buf)
		}
		if err == nil {
			err = f.Sync()
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errIO, err)
		}
		if round == 0 {
			fmt.Println("writing")
		}
	}
}

// setcap writes CAP_SETUID, permitted and effective, as a version 2
// security.capability attribute.
func setcap(args []string) error {
	attr := []byte{0x01, 0, 0, 0x02, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	return unix.Setxattr(args[0], "security.capability", attr, 0)
}
