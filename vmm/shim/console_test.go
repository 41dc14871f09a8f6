package shim

import (
	"bufio"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func (v *vm) openConsole() net.Conn {
	v.t.Helper()
	dir, err := os.Open(v.spec.RuntimeDir)
	if err != nil {
		v.t.Fatal(err)
	}
	defer dir.Close()
	conn, err := dialUnix("unix", dir, consoleName)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	return conn
}

func wantText(t *testing.T, r *bufio.Reader, want string) {
	t.Helper()
	var got strings.Builder
	for !strings.HasSuffix(got.String(), want) {
		b, err := r.ReadByte()
		if err != nil {
			t.Fatalf("read %q, want %q: %v", got.String(), want, err)
		}
		got.WriteByte(b)
	}
}

func TestConsole(t *testing.T) {
	v := startVM(t, "")
	first, second := v.openConsole(), v.openConsole()
	one, two := bufio.NewReader(first), bufio.NewReader(second)
	wantText(t, one, "login: ")
	wantText(t, two, "login: ")
	if _, err := first.Write([]byte("root\n")); err != nil {
		t.Fatal(err)
	}
	wantText(t, one, "root\n")
	wantText(t, two, "root\n")
	// The other one's typing is dropped while the first is there.
	_, _ = second.Write([]byte("intruder\n"))
	time.Sleep(50 * time.Millisecond)
	_, _ = first.Write([]byte("again\n"))
	wantText(t, two, "again\n")
	_ = first.Close()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, _ = second.Write([]byte("mine\n"))
		_ = second.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if line, err := two.ReadString('\n'); err == nil && line == "mine\n" {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the second never gets its turn")
		}
	}
	b, err := os.ReadFile(filepath.Join(v.spec.RuntimeDir, consoleLog))
	if err != nil || !strings.HasPrefix(string(b), "login: root\nagain\n") {
		t.Errorf("log is %q, %v", b, err)
	}
}

// A guest that talks without end fills neither disk nor memory, and a reader
// that does not read is let go.
func TestConsoleFlood(t *testing.T) {
	v := startVM(t, "chatty")
	v.openConsole() // never reads
	log := filepath.Join(v.spec.RuntimeDir, consoleLog)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(log + ".1"); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the log is never rotated")
		}
	}
	if st := v.put(v.object("a"), t.TempDir()); st.Phase != Attached {
		t.Errorf("%+v", st)
	}
	for _, name := range []string{log, log + ".1"} {
		if info, err := os.Stat(name); err != nil || info.Size() > maxLog {
			t.Errorf("%s: %v, %v", name, info.Size(), err)
		}
	}
}
