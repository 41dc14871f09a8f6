package cli_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/api/apitest"
	"spectrum-os.org/broker/cmd/spectrum-cap/internal/cli"
	"spectrum-os.org/broker/policy"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "policy-worker" {
		os.Exit(policy.WorkerMain())
	}
	testscript.Main(m, map[string]func(){"spectrum-cap": func() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		code := cli.Main(ctx, cli.Host{Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv})
		stop()
		os.Exit(code)
	}})
}

// serve serves f on a new socket until the test ends, and holds all that is
// said against the API's document.
func serve(t *testing.T, f api.Service) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "cap")
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	h := apitest.New(t, api.HostDocument).Wrap(api.NewHostHandler(f, api.HostOptions{}))
	go func() { done <- api.ServeHost(ctx, l, h, api.ServeOptions{}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(dir)
	})
	return socket
}

// TestScripts runs testdata/script, each with a broker of its own. In them
//
//	cap CODE args…   runs spectrum-cap in this process and asserts its exit code
//	keep NAME        keeps what stdout held in a variable
//	break            makes policies and the audit go wrong
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			f := newFake()
			env.Values["fake"] = f
			env.Setenv("SPECTRUM_BROKER_SOCKET", serve(t, f))
			env.Setenv("TZ", "UTC")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"cap": func(ts *testscript.TestScript, _ bool, args []string) {
				want, err := strconv.Atoi(args[0])
				ts.Check(err)
				var out, errs strings.Builder
				got := cli.Main(t.Context(), cli.Host{
					Args: args[1:], Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Getenv: ts.Getenv,
				})
				_, _ = io.WriteString(ts.Stdout(), out.String())
				_, _ = io.WriteString(ts.Stderr(), errs.String())
				if got != want {
					ts.Fatalf("exit code %d, want %d\nstdout: %s\nstderr: %s", got, want, out.String(), errs.String())
				}
			},
			"keep": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
			},
			"break": func(ts *testscript.TestScript, _ bool, _ []string) {
				f := ts.Value("fake").(*fake)
				f.mu.Lock()
				defer f.mu.Unlock()
				f.broken = true
			},
		},
	})
}

// run runs the command in this process.
func run(t *testing.T, socket string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	code = cli.Main(t.Context(), cli.Host{
		Args: append([]string{"--socket", socket}, args...), Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs,
		Getenv: func(string) string { return "" },
	})
	return code, out.String(), errs.String()
}

// TestEveryCommandIsDocumented: words, examples that are commands, and no
// flag without a meaning.
func TestEveryCommandIsDocumented(t *testing.T) {
	for _, path := range cli.Commands() {
		name := strings.Join(path, " ")
		code, help, _ := run(t, "/nonexistent", append(path, "--help")...)
		if code != 0 || !strings.Contains(help, "Examples:\n  ") || !strings.Contains(help, "spectrum-cap "+name) {
			t.Errorf("%s --help (code %d):\n%s", name, code, help)
		}
	}
}

func TestReferenceNamesEverything(t *testing.T) {
	var b strings.Builder
	if err := cli.WriteReference(&b); err != nil {
		t.Fatal(err)
	}
	for _, path := range cli.Commands() {
		if !strings.Contains(b.String(), "\n### spectrum-cap "+strings.Join(path, " ")+"\n") {
			t.Errorf("%v is missing", path)
		}
	}
	for _, c := range cli.ExitCodes() {
		if !strings.Contains(b.String(), fmt.Sprintf("| %d | %s |", c.Code, c.Text)) {
			t.Errorf("exit code %d is missing", c.Code)
		}
	}
	var again strings.Builder
	if err := cli.WriteReference(&again); err != nil || again.String() != b.String() {
		t.Errorf("it differs from one time to the next: %v", err)
	}
}

// TestUnreachable: every command that needs a broker says so, and where it
// looked.
func TestUnreachable(t *testing.T) {
	for _, args := range []string{
		"vm list", "vm show x", "vm start x", "vm stop x", "vm console x", "grant x fs:ro:work:/a", "revoke --all",
		"list", "show 12345678", "explain x fs:ro:work:/a", "token 12345678 --stdout", "policy reload", "policy status",
		"name list", "name set x 11111111", "name remove x", "partition list", "audit", "audit verify", "events", "keys list", "keys rotate", "keys revoke x", "events -f", "health", "plan", "plan x",
	} {
		code, stdout, stderr := run(t, "/nonexistent/s", strings.Fields(args)...)
		if code != 7 || !strings.Contains(stderr, "broker unreachable at /nonexistent/s") {
			t.Errorf("%s: code %d, %q, %q", args, code, stdout, stderr)
		}
	}
}
