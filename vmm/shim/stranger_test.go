package shim

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStrangerIsNotServed(t *testing.T) {
	v := startVM(t, "")
	// The directory keeps others out; the peer's uid is checked as well.
	if err := os.Chmod(v.spec.RuntimeDir, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(v.spec.RuntimeDir, sockName), 0o777); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, strangerArg, sockName)
	cmd.Dir = v.spec.RuntimeDir
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "nothing" {
		t.Errorf("%v: %s", err, out)
	}
}

// strangerArg makes the test binary a client that is another user.
const strangerArg = "stranger"

func strangerHelper(socket string) int {
	const nobody = 65534
	if err := errors.Join(syscall.Setgid(nobody), syscall.Setuid(nobody)); err != nil {
		fmt.Println(err)
		return 1
	}
	conn, err := net.Dial("unixpacket", socket)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	// Refused is to be cut off, before or after the request.
	_, _ = conn.Write([]byte(`{"op":"state"}`))
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 1<<10)
	n, err := conn.Read(b)
	if n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		fmt.Printf("%q, %v\n", b[:n], err)
		return 1
	}
	fmt.Println("nothing")
	return 0
}

// Whoever speaks badly gets an answer or is cut off; descriptors do not leak.
func TestBadPackets(t *testing.T) {
	v := startVM(t, "")
	fdDir := fmt.Sprintf("/proc/%d/fd", v.Proc().PID)
	open := func() (names []string) {
		fds, _ := os.ReadDir(fdDir)
		for _, fd := range fds {
			if name, err := os.Readlink(filepath.Join(fdDir, fd.Name())); err == nil {
				names = append(names, name)
			}
		}
		return names
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	// The first round is not counted: the client itself may still connect.
	speakBadly(t, v, null)
	time.Sleep(100 * time.Millisecond)
	before := open()
	speakBadly(t, v, null)
	for end := time.Now().Add(2 * time.Second); len(open()) > len(before) && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
	}
	if after := open(); len(after) > len(before) {
		t.Errorf("descriptors leaked: before %q, after %q", before, after)
	}
}

func speakBadly(t *testing.T, v *vm, null *os.File) {
	t.Helper()
	for _, c := range []struct {
		data string
		fds  int
	}{
		{"{}", 1},
		{"nonsense", 1},
		{"", 1},
		{`{"op":"state"}`, 1},
		{`{"op":"put"}`, 3},
		{`{"op":"remove","id":"x","object":{}}`, 0},
		{strings.Repeat("[", 9000), 0},
		{strings.Repeat(" ", maxRequest+1), 2},
	} {
		conn, err := v.connect()
		if err != nil {
			t.Fatal(err)
		}
		var rights []byte
		if c.fds > 0 {
			fds := make([]int, c.fds)
			for i := range fds {
				fds[i] = int(null.Fd())
			}
			rights = unix.UnixRights(fds...)
		}
		_, _, _ = conn.WriteMsgUnix([]byte(c.data), rights, nil)
		_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
		data, _, err := recvPacket(conn, maxReply)
		if err == nil && !bytes.Contains(data, []byte(`"error"`)) {
			t.Errorf("%.20q is answered by %s", c.data, data)
		}
		_ = conn.Close()
	}
}
