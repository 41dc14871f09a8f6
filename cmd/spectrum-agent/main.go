// Command spectrum-agent is the program inside every guest: "serve" answers
// the broker, the other commands ask it. Everything it does is in
// agents/app and agents/guestcli.
package main

import (
	"context"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"spectrum-os.org/broker/agents/app"
	"spectrum-os.org/broker/agents/guestcli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	status := guestcli.Main(ctx, guestcli.Options{
		Version: version(),
		Dial:    func(ctx context.Context) (net.Conn, error) { return app.DialBroker(ctx) },
		Serve:   func(ctx context.Context, _ string) error { return app.Run(ctx, version(), log) },
		Out:     os.Stdout,
		Err:     os.Stderr,
	}, os.Args[1:])
	stop()
	os.Exit(status)
}

// version is the module's, as the build recorded it.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
