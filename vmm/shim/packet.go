package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// sendPacket writes v as one packet, with descriptors.
func sendPacket(conn *net.UnixConn, v any, limit int, files ...*os.File) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(data) > limit {
		return fmt.Errorf("packet of %d bytes is longer than %d", len(data), limit)
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	n, _, err := conn.WriteMsgUnix(data, rights, nil)
	if err == nil && n != len(data) {
		err = io.ErrShortWrite
	}
	return err
}

// recvPacket reads one packet of at most limit bytes and one descriptor. It
// returns io.EOF when the peer has closed. Surplus descriptors are closed, and
// make the packet an error.
func recvPacket(conn *net.UnixConn, limit int) ([]byte, *os.File, error) {
	data := make([]byte, limit+1)
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(data, oob)
	if err != nil {
		return nil, nil, err
	}
	files, err := parseRights(oob[:oobn])
	switch {
	case err != nil:
	case n == 0 && len(files) == 0:
		return nil, nil, io.EOF
	case n > limit || flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("packet is longer than %d bytes", limit)
	case len(files) > 1 || flags&unix.MSG_CTRUNC != 0:
		err = errors.New("packet carries more than one descriptor")
	}
	if err != nil {
		for _, f := range files {
			_ = f.Close()
		}
		return nil, nil, err
	}
	if len(files) == 1 {
		return data[:n], files[0], nil
	}
	return data[:n], nil, nil
}

func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

// peerCred is who is at the other end: for a client, whoever called listen.
func peerCred(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, credErr
}

// dialUnix connects to name in dir however long dir's path is.
func dialUnix(network string, dir *os.File, name string) (*net.UnixConn, error) {
	return net.DialUnix(network, nil, &net.UnixAddr{Net: network, Name: shortPath(dir, name)})
}

// shortPath spells name in dir through the open descriptor, since the address
// of a socket holds 107 bytes only.
func shortPath(dir *os.File, name string) string {
	return filepath.Join(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), name)
}
