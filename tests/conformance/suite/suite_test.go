// SPDX-License-Identifier: Apache-2.0

// Package suite drives containerd's snapshotter conformance suite against a
// proxy snapshotter that is already listening on a unix socket.
//
// Environment:
//
//	SNAPSHOTTER_SOCKET  path of the unix socket (required)
//	SNAPSHOTTER_NAME    name put in every request (required)
package suite

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

func TestConformance(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("the suite mounts file systems: run it as root")
	}
	socket, name := os.Getenv("SNAPSHOTTER_SOCKET"), os.Getenv("SNAPSHOTTER_NAME")
	if socket == "" || name == "" {
		t.Fatal("SNAPSHOTTER_SOCKET or SNAPSHOTTER_NAME is not set")
	}

	dialCtx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := grpc.DialContext(dialCtx, "passthrough:///"+socket,
		grpc.WithInsecure(),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", addr)
		}),
		grpc.WithBlock(),
		grpc.FailOnNonTempDialError(true),
	)
	if err != nil {
		t.Fatalf("cannot reach %s: %v", socket, err)
	}
	// The subtests are parallel: they go on after this function has returned,
	// so the connection is closed by Cleanup and not by defer.
	t.Cleanup(func() { conn.Close() })
	client := snapshotsapi.NewSnapshotsClient(conn)

	// The suite of 1.7 renames a directory of a lower layer, unless it is told of an overlay: that cannot
	// (without redirect_dir), whoever answers with one.
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		r := &recorder{Snapshotter: proxy.NewSnapshotter(client, name), made: map[string]bool{}}
		return r, func() error {
			// root is PLAYGROUND/root; everything a subtest mounts is
			// under PLAYGROUND.
			if err := unmountBelow(filepath.Dir(root)); err != nil {
				return err
			}
			return r.removeAll(ctx)
		}, nil
	})
}

// recorder passes every call through unchanged and remembers the names it saw,
// so that one subtest's leftovers can be removed without touching those of the
// subtests running beside it on the same daemon. Without this a second run on
// the same daemon would find the fixed names (c1, a1, p, ...) taken.
type recorder struct {
	snapshots.Snapshotter
	mu   sync.Mutex
	made map[string]bool
}

func (r *recorder) note(key string, err error) {
	if err == nil {
		r.mu.Lock()
		r.made[key] = true
		r.mu.Unlock()
	}
}

func (r *recorder) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	m, err := r.Snapshotter.Prepare(ctx, key, parent, opts...)
	r.note(key, err)
	return m, err
}

func (r *recorder) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	m, err := r.Snapshotter.View(ctx, key, parent, opts...)
	r.note(key, err)
	return m, err
}

func (r *recorder) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	err := r.Snapshotter.Commit(ctx, name, key, opts...)
	r.note(name, err)
	return err
}

// removeAll removes what is left, children before parents.
func (r *recorder) removeAll(ctx context.Context) error {
	parent := map[string]string{}
	for key := range r.made {
		info, err := r.Stat(ctx, key)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("stat %q while cleaning up: %w", key, err)
		}
		parent[key] = info.Parent
	}
	depth := func(key string) int {
		n := 0
		for p, ok := parent[key]; ok; p, ok = parent[p] {
			n++
		}
		return n
	}
	left := make([]string, 0, len(parent))
	for key := range parent {
		left = append(left, key)
	}
	sort.Slice(left, func(i, j int) bool { return depth(left[i]) > depth(left[j]) })
	for _, key := range left {
		if err := r.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove %q while cleaning up: %w", key, err)
		}
	}
	return nil
}

// unmountBelow detaches whatever a failed subtest left mounted under dir. The
// suite deletes dir afterwards, and must not delete through a live mount.
func unmountBelow(dir string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var points []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 {
			if p := unescape.Replace(fields[4]); strings.HasPrefix(p, dir+"/") {
				points = append(points, p)
			}
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	for i := len(points) - 1; i >= 0; i-- {
		if err := unix.Unmount(points[i], unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			return fmt.Errorf("unmount %s: %w", points[i], err)
		}
	}
	return nil
}
