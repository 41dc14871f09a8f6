package shim

import (
	"io"
	"net"
	"os"
)

// fakeVirtiofsdMain answers one round trip and serves until the VMM hangs up.
func fakeVirtiofsdMain() int {
	l, err := net.FileListener(os.NewFile(controlFD, "listener"))
	if err != nil {
		return 5
	}
	conn, err := l.Accept()
	if err != nil {
		return 5
	}
	if _, err := io.ReadFull(conn, make([]byte, 12)); err != nil {
		return 6
	}
	if _, err := conn.Write(make([]byte, 12+8)); err != nil {
		return 6
	}
	_, _ = io.Copy(io.Discard, conn)
	return 0
}
