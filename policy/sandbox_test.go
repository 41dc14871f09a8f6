package policy

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
)

func TestSandboxHoldsNothing(t *testing.T) {
	for _, namespaces := range []bool{false, true} {
		name, env := "bare", "PROBE_NS=0"
		if namespaces {
			name, env = "namespaces", "PROBE_NS=1"
		}
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), self(t), "sandbox-probe")
			cmd.Env = []string{env}
			if namespaces {
				if os.Getuid() != 0 {
					t.Skip("MISSING: root, to make empty namespaces")
				}
				cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: inheritedNamespaces}
			}
			out, err := cmd.CombinedOutput()
			text := string(out)
			if err != nil || !strings.HasSuffix(text, "done\n") {
				t.Fatalf("%v\n%s", err, text)
			}
			if strings.Contains(text, "ESCAPE") {
				t.Errorf("%s", text)
			}
			for _, want := range []string{"rlimits", "no-new-privileges", "seccomp"} {
				if !strings.Contains(text, want) {
					t.Errorf("%s is not applied: %s", want, text)
				}
			}
			t.Log(strings.SplitN(text, "\n", 2)[0])
		})
	}
}

// TestSyscallNames holds the list to both architectures: an unknown name would
// keep every worker from starting.
func TestSyscallNames(t *testing.T) {
	for _, a := range []*arch.Info{arch.X86_64, arch.AARCH64} {
		policy := workerPolicy()
		for _, group := range policy.Syscalls {
			for _, name := range group.Names {
				if _, ok := a.SyscallNames[name]; !ok {
					t.Errorf("%s has no system call %s", a.Name, name)
				}
			}
			for _, c := range group.NamesWithCondtions {
				if _, ok := a.SyscallNames[c.Name]; !ok {
					t.Errorf("%s has no system call %s", a.Name, c.Name)
				}
			}
		}
		for _, forbidden := range []string{"openat", "open", "execve", "execveat", "socket", "connect", "kill", "ptrace", "io_uring_setup", "bpf"} {
			if slices.Contains(workerSyscalls, forbidden) {
				t.Errorf("%s is allowed", forbidden)
			}
		}
	}
	if workerPolicy().DefaultAction == seccomp.ActionAllow {
		t.Error("the filter allows by default")
	}
}
